"""The one exception that is a message to the user: one line saying what is wrong and what to type instead."""


class UserError(ValueError):
    def __init__(self, text: object) -> None:
        super().__init__(" ".join(str(text).split()))  # other libraries' messages, quoted, run over several lines
