"""What counts as text: UTF-8, with or without a byte order mark, lines ended in any of the usual ways."""

from compress.errors import InputError


def decode(raw: bytes, where: str) -> str:
    """Text from a file or standard input; `where` names it in the InputError for what is no text."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{where}: not UTF-8 text") from None
    if "\0" in text:  # UTF-16 of English is valid UTF-8 with a NUL after each letter
        raise InputError(f"{where}: not UTF-8 text (it holds NUL characters)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def refuse_surrogates(text: str, where: str) -> None:
    """Half a surrogate pair, as JSON can spell it and as Python reads arguments that are not UTF-8, is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"{where}: not text that UTF-8 can hold ({found} at character {error.start + 1})") from None
