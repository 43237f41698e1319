"""Action heads predict actions from the backbone's conditioning."""
