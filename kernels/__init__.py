"""The operators the passes insert: schema, gradients and a reference in plain torch (`ops`, `reference`).

Installed as `cggr_compile.kernels`. With the repository root on `sys.path`, transformers' probe for its hub kernels
does `import kernels` and gets this folder. Under that name it is an empty package, without version or submodules: the
probe concludes, correctly, that hub kernels are absent, and no operator can be registered a second time.
"""

if __name__ != "cggr_compile.kernels":
    __path__ = []
