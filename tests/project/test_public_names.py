"""Every public name that a release had is importable from where it was: modules may move, names may not."""

import importlib

import pytest

NAMES = {
    "annbatch_dask": "DatasetCollection Loader ZarrSparseDataset __version__ abc concat_lazy create_anndata_collection"
    " errors events install_as_annbatch io read_lazy samplers scdataset transforms types utils write_sharded",
    "annbatch_dask.abc": "Sampler",
    "annbatch_dask.as_annbatch": "install_as_annbatch",
    "annbatch_dask.cli": "main",
    "annbatch_dask.collection": "DatasetCollection",
    "annbatch_dask.errors": "AnnbatchDaskError CollectionBusyError CollectionChangedError CollectionError DeviceError"
    " ForeignScratchError IntegrityError LayoutError MemoryBudgetError MissingPackageError RankError SchedulerError"
    " SchemaError SelectionError SourceError SourceNotFoundError StateError StorageError WorkersDiedError",
    "annbatch_dask.etl.preload": "dask_setup",
    "annbatch_dask.events": "BuildEnd BuildStart Callback Callbacks StageEnd StageStart TaskEnd",
    "annbatch_dask.io": "DATASET_PREFIX DatasetCollection V1_ENCODING create_anndata_collection write_sharded",
    "annbatch_dask.lazy": "concat_lazy read_lazy",
    "annbatch_dask.lightning": "DataModule",
    "annbatch_dask.loader": "Loader",
    "annbatch_dask.manifest": "ANNBATCH_ENCODING BuildRecord DATASET_NAME DATASET_PREFIX DatasetRecord MANIFEST_KEY"
    " Manifest SourceRecord dataset_names dataset_number",
    "annbatch_dask.mixing": "Mixing batch_entropy expected_entropy measure_mixing plot_mixing sampled_batches",
    "annbatch_dask.progress": "ProgressBars default_callbacks",
    "annbatch_dask.report": "Report make_report",
    "annbatch_dask.samplers": "CellSets ClassSampler DistributedSampler MatchedControlSampler RandomSampler SequentialSampler"
    " WeightedClassSampler",
    "annbatch_dask.scdataset": "BlockShuffling BlockWeightedSampling ClassBalancedSampling MultiIndexable"
    " SamplingStrategy StrategySampler Streaming adata_to_mindex bionemo_to_tensor estimate_sample_size"
    " hf_tahoe_to_tensor scDataset suggest_parameters",
    "annbatch_dask.scdataset.experimental": "estimate_sample_size suggest_parameters",
    "annbatch_dask.splits": "Splits make_splits",
    "annbatch_dask.toml_splits": "TomlSplits read_toml_splits",
    "annbatch_dask.transforms": "BinnedExpression NormalizeLog1p RankTokens",
    "annbatch_dask.types": "LoadRequest LoaderOutput",
    "annbatch_dask.utils": "CSRContainer check_lt_1 convert load_all_aligned split_given_size",
    "annbatch_dask.where": "Condition GRAMMAR",
    # documented, though their modules are not meant to be imported
    "annbatch_dask.etl.verify": "Problem Verification",
    "annbatch_dask.plan.build": "Plan",
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_stay(module):
    if module == "annbatch_dask.lightning":
        pytest.importorskip("lightning")
    found = importlib.import_module(module)
    assert not [name for name in NAMES[module].split() if not hasattr(found, name)]
