"""Imports of thousands of modules at once: not looked through for garbage meanwhile, and without what nothing needs."""

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def many_imports(without: Sequence[str] = ()) -> Iterator[None]:
    """A `with` block that imports what stays: it is not looked through for garbage, now or later.

    Modules are objects that refer to each other by the million, and none of them is ever freed: to collect while they
    come takes a fifth of the time of importing torch and transformers. Inside another such block it changes nothing
    but what is left out.

    without   packages that are as if they were not installed, inside the block, unless they are imported already: of
              those that a library imports wherever it finds them
    """
    collects = gc.isenabled()
    gc.disable()
    left_out = [name for name in without if name not in sys.modules]
    # Documented: None in place of a module makes its import fail, and `find_spec` answer that there is none.
    sys.modules.update(dict.fromkeys(left_out))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in left_out:
            sys.modules.pop(name, None)
        if collects:
            gc.freeze()
            # At the end of the process all is freed: libraries in C++ complain of objects that are left then.
            atexit.register(gc.unfreeze)
            gc.enable()
