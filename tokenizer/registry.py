"""Building a named part from its {"type": name, **options} dict, with errors that name the nearest known thing."""

import difflib
import inspect


def nearest_known(name: str, known) -> str:
    """' (did you mean ...?)' or the empty string, followed by all known names."""
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    close.sort(key=lambda near: sorted(near) != sorted(str(name)))  # letters swapped are nearer than a letter changed
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(sorted(known))})"


def lookup(kind: str, registry: dict[str, type], name: str) -> type:
    """The class registered under `name`. Raises ValueError naming the nearest known one."""
    if name not in registry:
        raise ValueError(f"unknown {kind} '{name}'{nearest_known(name, registry)}")
    return registry[name]


def options_holder(part: type) -> type:
    """What the options of a part are arguments of: its constructor, or its `Config` where it is a model of its own."""
    return getattr(part, "Config", part)


def build(kind: str, registry: dict[str, type], options: dict, **implied):
    """The part that `options` describes; `implied` is what the surroundings determine (channels, sizes).

    Raises:
        ValueError: no or an unknown "type", or an option that the part does not have.
    """
    if not isinstance(options, dict):
        raise ValueError(f"{kind} must be a dict such as {{'type': '{next(iter(registry))}'}}, got {options!r}")
    options = dict(options)
    if "type" not in options:
        raise ValueError(f"{kind} needs a 'type'{nearest_known('', registry)}, got {options}")
    part = lookup(kind, registry, options.pop("type"))
    holder = options_holder(part)
    known = set(inspect.signature(holder).parameters) - set(implied)
    for option in options:
        if option not in known:
            raise ValueError(f"{kind} '{part.__name__}' has no option '{option}'{nearest_known(option, known)}")
    held = holder(**implied, **options)
    return held if holder is part else part(held)
