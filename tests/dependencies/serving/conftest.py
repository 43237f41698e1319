from tests.essential.serving.conftest import arm as arm
from tests.essential.serving.conftest import served as served
