"""Share runs and datasets on the Hugging Face hub, and repeat recorded experiments."""
