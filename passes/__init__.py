"""Graph rewrites: one module a pass, each a function `pass_(program, config) -> program`."""

if __name__ != "cggr_compile.passes":
    raise ImportError(f"{__name__!r} is not importable: this folder is installed as 'cggr_compile.passes'")
