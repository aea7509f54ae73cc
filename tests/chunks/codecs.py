"""Chains of codecs that zarr is given, and which of them one native call decodes."""

from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec

from annbatch_dask.storage.packed import PackedCodec

CODECS = {
    "blosc": [BloscCodec(cname="lz4", shuffle="shuffle")],
    "blosc-crc": [BloscCodec(cname="lz4", shuffle="shuffle"), Crc32cCodec()],
    "blosc-zstd": [BloscCodec(cname="zstd", shuffle="bitshuffle"), Crc32cCodec()],
    "none": None,
    "crc": [Crc32cCodec()],
    "gzip": [GzipCodec(level=1)],
    "packed": None,
    "packed-crc": [Crc32cCodec()],
}
SERIALIZERS = {"packed": PackedCodec(differences=True), "packed-crc": PackedCodec()}
NATIVE = [name for name in CODECS if name != "gzip"]
