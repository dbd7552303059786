"""What ONNX Runtime's own tools make of a float32 export: the baseline of the formats that fastlm.export writes.

    launch/local.sh -m fastlm.export --workdir runs/smollm2 --format onnx --to out/float32
    launch/local.sh -m experiments.benchmarks.onnx_tools --export out/float32 --tool int4 --to out/tools_int4
    launch/local.sh -m fastlm.evaluate --workdir out/tools_int4 --runtime onnx --source state_of_the_union

What is written is an export like any other: `fastlm.evaluate`, `fastlm.measure` and `experiments.benchmarks.decoding`
take it. Tools: `int8` is `quantize_dynamic` with a scale for each output, `int4` is `MatMulNBitsQuantizer` in symmetric
blocks of 32 with inputs rounded to eight bits. Both read plain products with weights (MatMul) and leave everything else
in float32: tables that are looked up in, and products with one of these turned round (tied embeddings).
Notable: the tools give each graph weights of its own. Of two graphs the second one's are `weights.data`, which is
what the ruler weighs.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from fastlm.exports import exported_model
from fastlm.exports import onnx as onnx_format
from fastlm.exports.exported_programs import SIGNATURE
from fastlm.exports.onnx_graph import DATA
from fastlm.training import workdir_files


def int8(graph: Path) -> onnx.ModelProto:
    """Eight bits, inputs rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    made = graph.with_suffix(".made")
    options = {"per_channel": True, "weight_type": QuantType.QInt8, "use_external_data_format": True}
    # It infers no types behind operators of the runtime's own.
    quantize_dynamic(graph, made, **options, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
    model = onnx.load(made)
    for left in graph.parent.glob(f"{made.name}*"):
        left.unlink()
    return model


def int4(graph: Path) -> onnx.ModelProto:
    """Four bits in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    tool = MatMulNBitsQuantizer(onnx.load(graph), bits=4, block_size=32, is_symmetric=True, accuracy_level=4)
    tool.process()
    return tool.model.model


TOOLS: dict[str, Callable[[Path], onnx.ModelProto]] = {"int8": int8, "int4": int4}


def make(export: Path, tool: str, folder: Path) -> None:
    """Writes what a tool makes of an export."""
    signature = json.loads((export / SIGNATURE).read_text())
    last = list(signature["programs"])[-1]
    for name, told in signature["programs"].items():
        beside = folder / "whole"  # the tools write beside what they read
        shutil.copytree(export, beside)
        model = TOOLS[tool](beside / told["file"])
        shutil.rmtree(beside)
        data = DATA if name == last else f"{name}.data"
        onnx.save_model(
            model, folder / told["file"], save_as_external_data=True, location=data, convert_attribute=False
        )
    signature["weights"] = f"{tool} by ONNX Runtime's tools"
    onnx_format.finish(folder, signature)
    for name in (exported_model.ABOUT, exported_model.TOKENIZER):
        shutil.copy(export / name, folder / name)


def main() -> None:
    """Writes it aside, renames, and says how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", required=True, type=Path, help="what fastlm.export wrote with --weights float32")
    parser.add_argument("--tool", required=True, choices=TOOLS)
    parser.add_argument("--to", required=True, type=Path)
    asked = parser.parse_args()
    with workdir_files.whole_folder(asked.to) as aside:
        make(asked.export, asked.tool, aside)
    print(f"wrote {asked.to}: {(asked.to / DATA).stat().st_size:,} bytes of weights")


if __name__ == "__main__":
    main()
