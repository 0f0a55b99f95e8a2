"""The cases of test_bad_inputs.py: the command line, the damage done before it, and part of the expected message."""

from tests.faults import bad_commands, bad_files, bad_settings

CASES = bad_settings.CASES | bad_files.CASES | bad_commands.CASES
