"""`launch.py COMMAND ...`: one module a command, each with main(arguments)."""
