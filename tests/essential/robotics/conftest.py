"""Robot datasets on disk."""

from tests.essential.robot_data import create_params as create_params
from tests.essential.robot_data import create_recording as create_recording
from tests.essential.robot_data import read_batch as read_batch
from tests.essential.robot_data import tokenizer_folder as tokenizer_folder
from tests.essential.robot_data import write_robot_data as write_robot_data
