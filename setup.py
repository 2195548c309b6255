"""The one compiled part, pipeline/data/_jpegcrop.c over libjpeg-turbo (optional).

Everything else is declared in pyproject.toml. To build it in place again:
    python setup.py build_ext --inplace
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pipeline.data._jpegcrop",
            ["pipeline/data/_jpegcrop.c"],
            libraries=["jpeg"],
            extra_compile_args=["-O3"],
            optional=True,  # a warning instead of an error; the loader then uses simplejpeg
        )
    ]
)
