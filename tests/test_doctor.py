"""The doctor: each finding from made-up circumstances, then the machine at hand."""

import io

import pytest
import torch

from sparsekd.measure import doctor
from sparsekd.measure.doctor import Finding
from sparsekd.measure.tuned import Tuned


def advice_of(findings):
    return "".join(finding.advice for finding in findings)


def test_report_covers_every_topic_in_plain_sentences():
    findings = doctor.report()
    topics = [finding.topic for finding in findings]
    for topic in ("python", "torch", "triton", "sparsekd", "extension", "CPU kernels", "environment", "threads"):
        assert topics.count(topic) == 1
    assert "compiler" in topics and "nvcc" in topics and "GPU" in topics
    for topic, value, advice in findings:  # plain triples
        assert value and "\n" not in topic + value + advice
        assert not advice or advice[0].isupper()


def test_packages_that_are_missing_are_named():
    (finding,) = doctor.packages({"timm": "1.0", "onnx": "2.0"}.get)
    assert finding.value == "timm 1.0, onnx 2.0" and finding.advice.endswith("install torchvision onnxruntime openvino")
    assert doctor.packages(lambda name: None)[0].value == "none" and not doctor.packages(lambda name: "1")[0].advice


def test_report_is_printed_in_columns():
    out = io.StringIO()
    doctor.print_report([Finding("a", "1"), Finding("long", "2", "Do this.")], out)
    assert out.getvalue() == "a     1\nlong  2\n      -> Do this.\n"
    out = io.StringIO()
    doctor.print_report([], out)
    assert out.getvalue() == ""


def test_extension_missing_unloaded_loaded(tmp_path):
    missing, unloaded = doctor.extension(None, None), doctor.extension(tmp_path / "_C.abi3.so", None)
    assert missing[0].value == "not built" and "Build it" in missing[0].advice
    assert "not loaded" in unloaded[0].value and "Build it again" in unloaded[0].advice
    loaded = doctor.extension(tmp_path / "_C.abi3.so", "avx2")
    assert loaded[1].value.startswith("avx2") and not advice_of(loaded)


def test_loaded_extension_is_seen():
    import sparsekd  # noqa: F401  registers the operators

    assert doctor.extension_file().name.startswith("_C.")
    assert doctor.loaded_isa() in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize(
    "nvcc,release,torch_cuda,says",
    [
        ("/cuda/bin/nvcc", "13.0", "13.0", ""),
        ("/cuda/bin/nvcc", "13.2", "13.0", ""),  # minor releases go together
        ("/cuda/bin/nvcc", "12.4", "13.0", "built for CUDA 13.0, so the CUDA half needs a toolkit 13.x"),
        ("/cuda/bin/nvcc", "13.0", None, "torch has no CUDA"),
        ("/cuda/bin/nvcc", None, "13.0", "Point CUDA_HOME"),
        (None, None, "13.0", "install a CUDA 13 toolkit"),
        (None, None, None, "builds without it"),
    ],
)
def test_toolkit_against_torch(nvcc, release, torch_cuda, says):
    (finding,) = doctor.toolkit(nvcc, release, torch_cuda)
    assert says in finding.advice and bool(says) == bool(finding.advice)


def test_architectures_that_nvcc_does_not_know():
    assert doctor.asked_architectures("8.0;9.0a+PTX 12.0") == [80, 90, 120]
    assert doctor.architectures(None, [80], "13.0") == []
    assert not advice_of(doctor.architectures("8.0;9.0+PTX", [80, 90], "13.0"))
    assert "can't compile for 7.0:" in advice_of(doctor.architectures("7.0;8.0", [80, 90], "13.0"))


@pytest.mark.parametrize(
    "capability,built_for,fits",
    [
        ((8, 6), ["sm_80"], True),  # a later minor of the same generation
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX is compiled by the driver
        ((7, 0), ["compute_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),  # the a-variants are tied to one device
        ((12, 0), ["sm_120"], True),
        ((8, 0), [], False),
    ],
)
def test_gpu_against_torch(capability, built_for, fits):
    assert doctor.runs_on(capability, built_for) is fits
    (finding,) = doctor.gpus([("GPU", capability)], built_for, "13.0")
    assert bool(finding.advice) is not fits


def test_environment_and_threads():
    wrong = {"SPARSEKD_CPU_ISA": "sse9", "SPARSEKD_CUDA": "yes", "SPARSEKD_GENERATE": "no"}
    (finding,) = doctor.environment({**wrong, "OTHER": "1"})
    assert finding.value == "SPARSEKD_CPU_ISA=sse9, SPARSEKD_CUDA=yes, SPARSEKD_GENERATE=no"
    assert "got 'sse9'" in finding.advice and "got 'yes'" in finding.advice and "got 'no'" in finding.advice
    assert "no SPARSEKD_ variable" in doctor.environment({})[0].value
    assert advice_of(doctor.threads(8, 2)) and not advice_of(doctor.threads(2, 2))


def test_wrong_variables_do_not_keep_it_from_telling(monkeypatch):
    def refuse():
        raise ValueError("Expected another value")  # as the extension does, asked under such variables

    monkeypatch.setattr(doctor, "loaded_isa", refuse)
    monkeypatch.setattr(doctor, "generates_code", refuse)
    findings = doctor.report({"SPARSEKD_CPU_ISA": "sse9", "SPARSEKD_GENERATE": "no"})
    assert Finding("generated code", "unknown") in findings
    for name in ("SPARSEKD_CPU_ISA", "SPARSEKD_GENERATE"):
        assert f"Expected {name} to be" in advice_of(findings)


def test_generated_code_and_why_there_is_none():
    assert not doctor.generated_code(True, "avx512").advice
    assert "AVX-512" in doctor.generated_code(False, "avx2").value
    assert "SPARSEKD_GENERATE" in doctor.generated_code(False, "avx512").advice


def test_no_compiler_no_nvcc(tmp_path):
    (finding,) = doctor.compiler({"PATH": str(tmp_path)})
    assert finding.value == "no c++" and "g++" in finding.advice
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("")
    assert doctor.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": ""}) == str(nvcc)
    assert doctor._run(str(tmp_path / "nothing")) == ""


def test_looking_changes_nothing():
    before = torch.get_num_threads(), torch.cuda.is_initialized()
    doctor.report({})
    assert (torch.get_num_threads(), torch.cuda.is_initialized()) == before


def test_tuned_figures(tmp_path):
    environ = {"SPARSEKD_CACHE_DIR": str(tmp_path), "SPARSEKD_TUNE": "full"}
    made = Tuned(tmp_path / "tuned-1.json", {})
    made.put("a", {"ms": 1.0})
    made.flush()
    (finding,) = doctor.tuned_figures(environ)
    assert finding.value == f"SPARSEKD_TUNE=full; 1 in 1 file(s) of {tmp_path}" and finding.advice == ""
    (tmp_path / "tuned-2.json").write_text("{")
    (finding,) = doctor.tuned_figures({**environ, "SPARSEKD_TUNE": "on"})
    assert "tuned-2.json is broken" in finding.advice and "Expected SPARSEKD_TUNE to be" in finding.advice
    assert (tmp_path / "tuned-2.json").exists()  # doctor only looks
