"""The compiled parts (optional): the JPEG decoder over libjpeg-turbo, the check of JPEGs, and what
cuts them by restart markers.

Everything else is declared in pyproject.toml. To build them in place again:
    python setup.py build_ext --inplace
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "pipeline.data._jpegcrop",
            ["pipeline/data/_jpegcrop.c"],
            depends=["pipeline/data/_entropy.h", "pipeline/data/_resize.h"],
            libraries=["jpeg"],
            extra_compile_args=["-O3"],
            optional=True,  # a warning instead of an error; the loader then uses simplejpeg
        ),
        Extension(
            "shard_tools.image_file._jpegcheck",
            ["shard_tools/image_file/_jpegcheck.c"],
            extra_compile_args=["-O3"],
            optional=True,  # simplejpeg decodes each file instead
        ),
        Extension(
            "shard_tools.image_file._jpegmarkers",
            ["shard_tools/image_file/_jpegmarkers.c"],
            libraries=["jpeg"],
            extra_compile_args=["-O3"],
            optional=True,  # make_shards then has no --restart-markers
        ),
    ]
)
