"""What a device returned is read however it was stored, fitted to the manifest, and refused if it does not fit."""

import io
import re
import shutil
import tracemalloc
import zipfile
import zlib

import h5py
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import refimpl
from export import emit
from export.folder.arrays import read_arrays
from export.folder.manifest import read_manifest
from export.graphs.naming import sanitised
from export.graphs.plan import Plan
from export.measure.device import read_answers, read_device
from export.measure.references import grids_of
from refimpl.errors import InputError
from refimpl.grids.calibrate import calibrate
from refimpl_kernels.affine import fake_quantize, quantize

PROMPT = [3, 1, 4, 15, 9, 26]
MIDDLE, LAST = "prompt_ar8_cl24_2_of_3", "prompt_ar8_cl24_3_of_3"


@pytest.fixture(scope="module")
def parts(tmp_path_factory, tiny_folder):
    """An export's folder, its specs by name, and the golden outputs of each graph."""
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    folder = emit(model, tokens=(8, 1), context=24, parts=3, prompt=PROMPT).save(tmp_path_factory.mktemp("x") / "x")
    plan, _ = read_manifest(folder)
    specs = {spec.name: spec for run in plan.runs for spec in run}
    goldens = {name: read_arrays(folder, spec, "output", spec.outputs) for name, spec in specs.items()}
    return model, folder, specs, goldens


def expect(parts, outputs, graph=MIDDLE, rtol=0.0, **options):
    """Reads outputs of one graph, and compares them with the golden; returns the answer."""
    _, folder, _, goldens = parts
    (answer,) = read_answers(folder, outputs, **options)
    assert answer.spec.name == graph
    for name, array in answer.arrays.items():
        assert array.dtype == np.float32
        real = (slice(None),) * next(v.token_axis for v in answer.spec.outputs if v.name == name) + (slice(2, None),)
        np.testing.assert_allclose(array[real], goldens[graph][name][real], rtol=rtol, atol=rtol, err_msg=name)
    return answer


def refused(parts, outputs, match, **options):
    with pytest.raises(InputError, match=match) as caught:
        read_answers(parts[1], outputs, **options)
    assert "\n" not in str(caught.value)


def write_h5(path, arrays, order=True, **options):
    with h5py.File(path, "w") as file:
        for i, (name, array) in enumerate(arrays.items()):
            file.create_dataset(f"data/{i}/batch_0", data=array, **{"compression": "gzip", **options})
            file[f"data/{i}"].attrs["name"], file[f"data/{i}"].attrs["batch_count"] = name, 1
            if order:
                file[f"data/{i}"].attrs["order"] = i
    return path


def write_pbs(folder, arrays):
    folder.mkdir()
    for i, (name, array) in enumerate(arrays.items()):
        (folder / f"output_{i}.pb").write_bytes(numpy_helper.from_array(array, name).SerializeToString())
    return folder


def write_raws(folder, arrays):
    (folder / "Result_0").mkdir(parents=True)
    for name, array in arrays.items():
        (folder / "Result_0" / f"_{sanitised(name)}.raw").write_bytes(array.tobytes())
    return folder


def write_npys(folder, arrays):
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def write_npz(path, arrays):
    np.savez_compressed(path, **arrays)
    return path


FORMS = {
    "hdf5": lambda path, arrays: write_h5(path / "a.h5", arrays),
    "hdf5, shuffled chunks": lambda path, arrays: write_h5(path / "a.h5", arrays, shuffle=True, chunks=True),
    "hdf5, plain": lambda path, arrays: write_h5(path / "a.h5", arrays, compression=None),
    "npz": lambda path, arrays: write_npz(path / "a.npz", arrays),
    "npy": lambda path, arrays: write_npys(path / "a", arrays),
    "raw": lambda path, arrays: write_raws(path / "a", arrays),
    "pb": lambda path, arrays: write_pbs(path / "a", arrays),
    "mapping": lambda path, arrays: arrays,
    "result of AI Hub": lambda path, arrays: {name: [array] for name, array in arrays.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(parts, tmp_path, form):
    answer = expect(parts, FORMS[form](tmp_path, parts[3][MIDDLE]))
    assert not answer.remarks
    assert list(answer.trace) == ["model.layers.0.self_attn.key", "model.layers.0.self_attn.value", "model.layers.0"]
    assert answer.trace["model.layers.0.self_attn.key"].shape == (1, 4, 6, 16)


def test_hdf5_is_what_the_client_writes(parts, tmp_path):
    from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5

    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset_entries_to_h5({name: [array] for name, array in parts[3][LAST].items()}, file)
    expect(parts, tmp_path / "a.h5", LAST)


def test_a_folder_of_many_graphs(parts, tmp_path):
    goldens = parts[3]
    for way in ("isolated", "chained"):
        (tmp_path / way).mkdir()
        write_h5(tmp_path / way / f"{MIDDLE}.h5", goldens[MIDDLE])
    write_raws(tmp_path / "chained" / LAST, goldens[LAST])
    trace = read_device(parts[1], tmp_path)
    assert [name for name in trace if name.endswith("key")] == [
        f"{MIDDLE}/isolated/model.layers.0.self_attn.key", f"{MIDDLE}/chained/model.layers.0.self_attn.key",
        f"{LAST}/chained/model.layers.1.self_attn.key",
    ]  # fmt: skip
    assert f"{LAST}/chained/lm_head" in trace
    write_npz(tmp_path / "chained" / f"{MIDDLE}.npz", goldens[MIDDLE])
    refused(parts, tmp_path, "chained outputs twice")
    nested = read_device(parts[1], {"chained": {MIDDLE: goldens[MIDDLE], LAST: goldens[LAST]}})
    assert set(nested) == {name for name in trace if "/chained/" in name}


RENAMED = {
    "sanitised": sanitised,
    "with an underscore": lambda name: "_" + sanitised(name),
    "of the tap": lambda name: {"past_key_0_out": "model.layers.0.self_attn.key"}.get(name, name),
    "of the tap, with slashes": lambda name: {"past_key_0_out": "/model/layers.0/self_attn/key"}.get(name, name),
}


@pytest.mark.parametrize("names", RENAMED)
def test_names_are_inverted_through_the_manifest(parts, names):
    answer = expect(parts, {RENAMED[names](name): array for name, array in parts[3][MIDDLE].items()})
    assert set(answer.arrays) == set(parts[3][MIDDLE])


SHAPES = {
    "without axes of 1": (lambda key: key[:, 0], "without"),
    "transposed": (lambda key: key.transpose(0, 1, 3, 2), "transposed"),
    "the whole cache": (lambda key: np.concatenate([np.ones((4, 1, 16, 16), "f4"), key], 3), "last 8 of a cache of 24"),
    "the whole cache, transposed": (
        lambda key: np.concatenate([np.ones((4, 1, 16, 16), "f4"), key], 3).transpose(0, 1, 3, 2), "transposed.*last 8"
    ),
    "without padding": (lambda key: key[..., 2:], "padding was cut off"),
    "as float64": (lambda key: key.astype("f8"), "stored as float64"),
}  # fmt: skip


@pytest.mark.parametrize("change", SHAPES)
def test_layouts_are_fitted_and_said(parts, change):
    function, said = SHAPES[change]
    outputs = {**parts[3][MIDDLE], "past_key_0_out": function(parts[3][MIDDLE]["past_key_0_out"])}
    answer = expect(parts, outputs)
    (remark,) = answer.remarks
    assert re.search(said, remark) and remark.startswith("past_key_0_out: ")


def test_narrow_floats_are_widened(parts, tmp_path):
    for dtype, rtol in (("float16", 1e-3), (ml_dtypes.bfloat16, 1e-2)):
        expect(parts, {name: array.astype(dtype) for name, array in parts[3][MIDDLE].items()}, rtol=rtol)
    halves = {name: array.astype("f2") for name, array in parts[3][MIDDLE].items()}
    expect(parts, write_raws(tmp_path / "a", halves), rtol=1e-3)


def test_codes_become_values(parts, tmp_path):
    model = parts[0]
    encodings = calibrate(model, PROMPT)
    grids = grids_of(encodings, model.config)
    values, codes = {}, {}
    for value in parts[2][MIDDLE].outputs:
        array, grid = parts[3][MIDDLE][value.name], grids[value.tap]
        values[value.name] = fake_quantize(array, grid)
        codes[value.name] = quantize(array, grid).astype(f"u{grid.bits // 8}")
    signed = {name: (c.astype(int) - 2 ** (8 * c.itemsize - 1)).astype(f"i{c.itemsize}") for name, c in codes.items()}
    wide = {name: c.astype("i4") for name, c in codes.items()}
    for outputs in (codes, signed, wide, write_raws(tmp_path / "a", codes), write_h5(tmp_path / "b.h5", codes)):
        (answer,) = read_answers(parts[1], outputs, grids)
        for name, array in answer.arrays.items():
            np.testing.assert_array_equal(array, values[name])
        assert all("codes" in remark for remark in answer.remarks)
    refused(parts, codes, "holds uint16, but model.layers.0 is float32 and has no encoding")
    (answer,) = read_answers(parts[1], write_raws(tmp_path / "c", codes), grids)
    assert ["float16" in remark for remark in answer.remarks] == [c.itemsize == 2 for c in codes.values()]
    halves = {name: array.astype("f2") for name, array in parts[3][MIDDLE].items()}
    refused(
        parts, write_raws(tmp_path / "d", halves), "has 8 bits; a .npy would say so if they are float16", grids=grids
    )
    wide["past_key_0_out"][0, 0, 0, 0] = 256
    refused(parts, wide, "codes from .* to 256, expected 0 to 255: its grid has 8 bits", grids=grids)


def test_probes_are_read(parts):
    spec = parts[2][MIDDLE]
    probe = np.ones((1, 8, 128), np.float32)
    (answer,) = read_answers(parts[1], {**parts[3][MIDDLE], "_model_layers_0_mlp_product": probe})
    assert answer.trace["model.layers.0.mlp.product"].shape == (1, spec.real, 128)
    assert list(answer.trace)[2:] == ["model.layers.0.mlp.product", "model.layers.0"]
    refused(parts, {**parts[3][MIDDLE], "model.layers.1.mlp.product": probe}, "fit none of the 6 graphs")


def test_whose_outputs_they_are(parts, tmp_path):
    expect(parts, {f"output_{i}": array for i, array in enumerate(parts[3][MIDDLE].values())})
    refused(
        parts, {"past_key_0_out": np.zeros((4, 1, 16, 24))}, "may be of 2 graphs, prompt_.*, token_.*; name the file"
    )
    refused(parts, {"logits": np.zeros((1, 3, 96), "f4")}, "fit none of the 6 graphs.*name the file")
    three = {"logits": np.zeros((1, 3, 96), "f4")}
    refused(parts, three, r"shape \(1, 3, 96\), but logits of prompt.* is \(1, 8, 96\)", graph=LAST)
    refused(parts, {"lm": np.zeros(3)}, "'lm' is not an output of prompt.*which gives logits, past", graph=LAST)
    refused(parts, {"nope": {"a": np.zeros(3)}}, "there is no graph 'nope'")
    refused(parts, {MIDDLE: {}}, "there are no outputs")
    refused(parts, {"logits": [np.zeros((1, 8, 96))] * 3}, "has 3 samples", graph=LAST)
    refused(parts, {"logits": np.zeros((1, 8, 96)), "lm_head": np.zeros((1, 8, 96))}, "are both logits", graph=LAST)
    refused(parts, tmp_path / "absent", "neither a file nor a folder")
    refused(parts, tmp_path, "holds no outputs")
    refused(parts, {}, "there are no outputs", graph=LAST)
    refused(parts, {}, "no graph", graph="x")
    refused(parts, {"a": np.array(["text"])}, "not an output|real numbers|fit none", graph=LAST)


def test_what_is_no_outputs_is_told(parts, tmp_path):
    for outputs, match in [
        (5, "type int, expected a path or a mapping"), (None, "type NoneType"),
        ({"logits": [[1, 2], [3]]}, "is not an array of numbers"), ({"logits": ["x"]}, "expected real numbers"),
        ({"logits": None}, "holds object"),
    ]:  # fmt: skip
        refused(parts, outputs, match, graph=LAST)
    write_npz(tmp_path / "isolated.npz", parts[3][LAST])
    (tmp_path / "outputs" / "phone" / "isolated").mkdir(parents=True)
    refused(parts, tmp_path / "outputs", "give one of them: .*outputs/phone")


def test_a_square_cache_is_told_to_be_one(tiny_folder, tmp_path):
    """Nothing but the golden could tell a transposed one, and it has the last slot alone."""
    model = refimpl.load(tiny_folder("Baichuan2-7B"))
    context = model.config.head_dim
    folder = emit(model, tokens=1, context=context, parts=1, prompt=[3]).save(tmp_path / "x")
    [spec] = read_manifest(folder)[0].runs[0]
    golden = read_arrays(folder, spec, "output", spec.outputs)
    for name, axis in (("past_key_0_out", 3), ("past_value_0_out", 2)):
        full = np.concatenate([np.zeros_like(golden[name])] * (context - 1) + [golden[name]], axis)
        [answer] = read_answers(folder, {name: full})
        assert f"taken to be on axis {axis}, for another one has {context} as well" in answer.remarks[0]
        assert np.array_equal(answer.arrays[name], golden[name])


def test_raw_files_have_the_size(parts, tmp_path):
    folder = write_raws(tmp_path / "a", {**parts[3][MIDDLE], "model.layers.0": np.zeros(5, "f4")})
    refused(parts, folder, "20 bytes, but model.layers.0 of .* is .*2048 as float32", graph=MIDDLE)
    (folder / "Result_1").mkdir()
    refused(parts, folder, "has 2 samples")


def spoil_npz(path, name, data):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}.npy", data)
    return path


def npy_bytes(array, shape=None, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    data = buffer.getvalue()
    return data.replace(str(array.shape).encode(), str(shape).encode()) if shape else data


def test_hostile_npz(parts, tmp_path):
    good = parts[3][LAST]["logits"]
    for data, match in [
        (npy_bytes(good)[:-4], "says 3072 bytes and has only 3068"),
        (npy_bytes(good) + b"x", "3072 bytes and has more"),
        (npy_bytes(np.array([{}], object), allow_pickle=True), "npz: it holds object, expected real numbers; store"),
        (npy_bytes(good.astype(complex)), "npz: it holds complex128, expected real numbers; store"),
        (npy_bytes(np.asfortranarray(good[0])), "npz: its numbers are in Fortran's order"),
        (npy_bytes(np.zeros((1, 8, 96), "f4"), (1, 8, 96 * 10**9)), r"shape \(1, 8, 96000000000\), but logits"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os').system('true')}", "damaged"),
        (b"no header", "damaged"),
    ]:
        refused(parts, spoil_npz(tmp_path / "a.npz", "logits", data), match, graph=LAST)
    header = b"\x93NUMPY\x02\x00" + (50 << 20).to_bytes(4, "little") + b" " * (50 << 20)
    (tmp_path / "logits.npy").write_bytes(header)
    for path in (spoil_npz(tmp_path / "b.npz", "logits", header), tmp_path / "logits.npy"):
        tracemalloc.start()
        refused(parts, path, "its header claims 52428800 bytes, expected at most 10000; fetch it again", graph=LAST)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20, path
        tracemalloc.stop()
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    refused(parts, tmp_path / "a.npz", "damaged")
    (tmp_path / "a.txt").write_text("logits")
    refused(parts, tmp_path / "a.txt", "is none of .h5")


def test_hostile_hdf5(parts, tmp_path):
    good = parts[3][LAST]
    path = tmp_path / "a.h5"

    def change(function, **options):
        write_h5(path, good, **options)
        with h5py.File(path, "r+") as file:
            function(file)
        return path

    def replaced(make):
        def function(file):
            del file["data/0/batch_0"]
            make(file)

        return function

    def external(file):
        file.create_dataset("data/0/batch_0", (1, 8, 96), "f4", external=[("/etc/passwd", 0, 3072)])

    def virtual(file):
        layout = h5py.VirtualLayout((1, 8, 96), "f4")
        layout[:] = h5py.VirtualSource("/etc/passwd", "x", (1, 8, 96))
        file.create_virtual_dataset("data/0/batch_0", layout)

    def linked(file):
        file["data/0/batch_0"] = h5py.ExternalLink("/etc/passwd", "/x")

    def huge(file):
        file.create_dataset("data/0/batch_0", (10**6, 10**6), "f4", chunks=(64, 64), compression="gzip")

    def filtered(file):
        file.create_dataset("data/0/batch_0", data=good["logits"], compression="lzf")

    def objects(file):
        file.create_dataset("data/0/batch_0", data=["a", "b"], dtype=h5py.string_dtype())

    def bomb(file):
        stored = file.create_dataset("data/0/batch_0", (1, 8, 96), "f4", chunks=(1, 8, 96), compression="gzip")
        stored.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(10**7)))

    def garbage(file):
        stored = file.create_dataset("data/0/batch_0", (1, 8, 96), "f4", chunks=(1, 8, 96), compression="gzip")
        stored.id.write_direct_chunk((0, 0, 0), b"not gzip")

    def unwritten(file):
        file.create_dataset("data/0/batch_0", (1, 8, 96), "f4", chunks=(1, 8, 96), compression="gzip")

    for make, match in [
        (external, "kept in other files"), (virtual, "kept in other files"), (linked, "links to it elsewhere"),
        (huge, r"shape \(1000000, 1000000\), but logits"), (filtered, "filters .32000."), (objects, "holds object"),
        (bomb, "not hold its 3072 bytes"), (garbage, "damaged"), (unwritten, "lacks its chunk"),
    ]:  # fmt: skip
        spoilt = change(replaced(make))
        peaks = []
        for _ in range(2):  # other packages may load what they need when they are asked first
            tracemalloc.start()
            refused(parts, spoilt, match, graph=LAST)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert min(peaks) < 2 << 20, make.__name__
    refused(parts, change(lambda file: file["data/0"].attrs.pop("name")), "no name", graph=LAST)
    refused(parts, change(lambda file: file["data/0"].attrs.__setitem__("name", 3)), "not a text", graph=LAST)
    refused(parts, change(lambda file: file["data/0"].attrs.__setitem__("batch_count", 2)), "2 samples", graph=LAST)
    refused(parts, change(lambda file: file.move("data", "date")), "lacks 'data'", graph=LAST)
    write_h5(path, good)
    data = path.read_bytes()
    for cut in (0, 8, 100, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:cut])
        refused(parts, path, "damaged", graph=LAST)


def test_hostile_pb(parts, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    proto = numpy_helper.from_array(parts[3][LAST]["logits"], "logits")
    data = proto.SerializeToString()
    for spoilt, match in [
        (data[:-9], "damaged"),
        (data + bytes(1 << 20), "bytes; the largest output has"),
        (b"\xff" * 9, "damaged"),
    ]:
        (folder / "a.pb").write_bytes(spoilt)
        refused(parts, folder, match, graph=LAST)
    proto.dims[:] = [1 << 40, 1 << 40]
    (folder / "a.pb").write_bytes(proto.SerializeToString())
    refused(parts, folder, "larger than any output", graph=LAST)
    proto.dims[:] = [1, 8, 96]
    proto.data_location = onnx.TensorProto.EXTERNAL
    (folder / "a.pb").write_bytes(proto.SerializeToString())
    refused(parts, folder, "elsewhere", graph=LAST)


def test_a_changed_golden_is_told(parts, tmp_path):
    copy = shutil.copytree(parts[1], tmp_path / "copy")
    (copy / "test_data" / LAST / "test_data_set_0" / "output_0.pb").write_bytes(b"")
    with pytest.raises(InputError, match="not the file of"):
        read_answers(copy, parts[3][LAST])
    assert isinstance(read_manifest(parts[1], weights=False)[0], Plan)
