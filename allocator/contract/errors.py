"""The errors a user can meet, each with the exit code the command line returns for it."""

__all__ = ["ContractError", "GammaError", "InfeasibleBudgetError", "InputError", "StoppedError"]


class GammaError(Exception):
    """Base of all errors that are explained to the user instead of shown as a traceback."""

    exit_code = 1


class InputError(GammaError):
    """An argument, a model folder or a text that cannot be used. The message says what is allowed."""

    exit_code = 2


class ContractError(GammaError):
    """A file that is damaged, of an unknown version, or does not belong to the others. Nothing was used."""

    exit_code = 3


class InfeasibleBudgetError(GammaError):
    """No assignment fits the budget. The message names the feasible range."""

    exit_code = 4


class StoppedError(GammaError):
    """Work that was asked to stop (SIGTERM) and kept what it had done. 75 is EX_TEMPFAIL: run it again."""

    exit_code = 75
