"""How bad input must be refused: with one sentence, as an InputError or on stderr."""

import pytest

from compress.errors import InputError


def refusal(action) -> str:
    """The sentence of the InputError that `action` must end with."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def refusal_of_command(result, code: int = 2) -> str:
    """The one sentence on stderr of a command that ended with the exit code for bad input."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    return result.stderr
