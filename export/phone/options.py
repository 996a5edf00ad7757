"""The options of compile, link, inference and profile jobs, as AI Hub and QAIRT take them.

**Source**: AI Hub's generic export of language models (ai-hub-models 0.46).
"""

from __future__ import annotations

from dataclasses import dataclass

from export.phone.source import Source


@dataclass(frozen=True)
class Options:
    """QAIRT's version, and what is added to the options of each kind of job."""

    qairt: str = "2.42"
    compile: str = ""
    link: str = ""
    run: str = ""

    def for_compile(self, source: Source) -> str:
        """For a graph: quantized by its encodings if it has any, else in float16, the float of the device."""
        words = ["--target_runtime qnn_dlc", self._version, f"--output_names {','.join(source.outputs)}"]
        enable = f"--qnn_options context_enable_graphs={source.name}"
        if source.quantized:  # --quantize_io twice, as AI Hub's own export says it
            words += ["--quantize_io", enable, "--quantize_full_type w8a16 --quantize_io"]
        else:
            words.append(enable)
        return " ".join(filter(None, [*words, self.compile]))

    def for_link(self) -> str:
        return " ".join(filter(None, [self._version, self.link]))

    def for_inference(self, graph: str) -> str:
        return " ".join(filter(None, [self._version, f"--qnn_options context_enable_graphs={graph}", self.run]))

    def for_profile(self, graph: str) -> str:
        return " ".join([self.for_inference(graph), "--max_profiler_iterations 50"])

    @property
    def _version(self) -> str:
        return f"--qairt_version {self.qairt}" if self.qairt else ""
