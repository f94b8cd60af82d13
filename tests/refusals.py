"""How bad input must be refused: with an InputError of one sentence."""

import pytest

from compress.errors import InputError


def refusal(action) -> str:
    """The sentence of the InputError that `action` must end with."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message
