"""The tests run offline: missing data fails at once instead of waiting for the hub."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
