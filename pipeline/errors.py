"""The one exception that is a message to the user: one line saying what is wrong and what to type instead."""


class UserError(ValueError):
    pass
