"""Numbers as people write them."""


def hours(value: float) -> str:
    """A time for people.

    >>> hours(0.01), hours(1.26), hours(100)
    ('36 s', '1.3 h', '4.2 days')
    """
    if value < 1 / 60:
        return f'{3600 * value:.2g} s'
    if value < 1:
        return f'{60 * value:.2g} min'
    return f'{value:.2g} h' if value < 48 else f'{value / 24:.2g} days'


def many(value: float) -> str:
    """A large number for people.

    >>> many(26971.3), many(1814759)
    ('26,971', '1.81M')
    """
    return f'{value:,.0f}' if value < 1e6 else f'{value / 1e6:.2f}M'


def milliseconds(seconds: float) -> str:
    """A step's time for people, in milliseconds.

    >>> milliseconds(0.0012345), milliseconds(2.5217)
    ('1.23', '2,522')
    """
    return f'{1e3 * seconds:.3g}' if seconds < 0.1 else f'{1e3 * seconds:,.0f}'


def size(value: float) -> str:
    """Bytes for people.

    >>> size(2.5e9), size(3e6), size(51_100)
    ('2.5 GB', '3 MB', '51.1 kB')
    """
    unit, name = next(((u, n) for u, n in ((1e9, 'GB'), (1e6, 'MB')) if value >= u), (1e3, 'kB'))
    return f'{value / unit:.3g} {name}'
