"""The operators the passes insert: schema, gradients and a reference in plain torch (`ops`, `reference`).

Installed as `cggr_compile.kernels`. With the repository root on `sys.path`, transformers' `import kernels` (its
hub-kernels probe) would find this folder and register every operator twice under a second name; refusing the
bare name closes that trap and lets transformers conclude, correctly, that hub kernels are absent.
"""

if __name__ != "cggr_compile.kernels":
    raise ImportError(f"{__name__!r} is not importable: this folder is installed as 'cggr_compile.kernels'")
