"""Ctrl-C at a fixed place, so that nothing depends on time."""


def stop_after(monkeypatch, owner, name: str, calls: int) -> None:
    """Ctrl-C at the call of `owner.name` that follows `calls` complete ones."""
    real, left = getattr(owner, name), iter(range(calls))

    def stopped(*arguments, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, stopped)
