// Every operator's schema: the index of what the kernels can do. Meaning: sparsekd/sparse/reference.py; shapes,
// errors, fakes and gradients: sparsekd/sparse/ops/.
#include <Python.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "arena.h"
#include "check.h"
#include "cpu/kept_code.h"
#include "planned_sequence.h"
#include "result_pool.h"

// abi3: the same file loads in every Python from 3.10 on. Importing it only runs the registrations below.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

namespace sparsekd {

const char* cpu_isa();

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<at::Tensor, at::Tensor> kd_loss_forward(const at::Tensor& student, const at::Tensor& teacher,
                                                   const std::optional<at::Tensor>& target, double temperature,
                                                   double alpha, int64_t ignore_index, double label_smoothing,
                                                   bool distill_ignored, bool with_grad) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("sparsekd::kd_loss_forward", "")
                             .typed<decltype(kd_loss_forward)>();
  return op.call(student, teacher, target, temperature, alpha, ignore_index, label_smoothing, distill_ignored,
                 with_grad);
}

// In C++ because a Python autograd function costs more than the whole loss of a small batch.
struct KDLoss : torch::autograd::Function<KDLoss> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& student, const at::Tensor& teacher,
                            const std::optional<at::Tensor>& target, double temperature, double alpha,
                            int64_t ignore_index, double label_smoothing, bool distill_ignored) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, grad] = kd_loss_forward(student, teacher, target, temperature, alpha, ignore_index, label_smoothing,
                                        distill_ignored, true);
    ctx->save_for_backward({grad});
    ctx->saved_data["dtype"] = static_cast<int64_t>(student.scalar_type());
    return loss;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // Without this the gradient would be taken for a constant.
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "Expected kd_loss to be differentiated once: its gradient is made in the forward; for a second "
                "derivative use sparsekd.sparse.reference.kd_loss_reference, got a backward with create_graph=True");
    at::Tensor grad = ctx->get_saved_variables()[0];
    // loss.backward() hands in 1. The gradient is then passed on as it is: a copy costs as much as making it did.
    const bool plain = grads[0].device().is_cpu() && !at::isTensorSubclassLike(grads[0]);
    if (!plain || grads[0].item<double>() != 1.0) grad = at::mul(grad, grads[0]);
    return {grad.to(static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt())), {}, {}, {}, {}, {}, {}, {}};
  }
};

at::Tensor kd_loss(const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& target,
                   double temperature, double alpha, int64_t ignore_index, double label_smoothing,
                   bool distill_ignored) {
  if (at::GradMode::is_enabled() && student.requires_grad()) {
    return KDLoss::apply(student, teacher, target, temperature, alpha, ignore_index, label_smoothing,
                         distill_ignored);
  }
  return std::get<0>(kd_loss_forward(student, teacher, target, temperature, alpha, ignore_index, label_smoothing,
                                     distill_ignored, false));
}

}  // namespace
}  // namespace sparsekd

TORCH_LIBRARY(sparsekd, m) {
  // Sparse weight in V x 1 vector-CSR (sparsekd/sparse/formats.py), dense activations.
  m.def("conv2d(Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? row_indices, "
        "Tensor? transpose, Tensor? bias, SymInt out_channels, SymInt[2] kernel_size, SymInt[2] stride, "
        "SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  // act(scale * conv2d + shift + residual), act one of none, relu, relu6, silu, hardswish; for inference.
  m.def("conv2d_fused(Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? row_indices, "
        "Tensor? scale, Tensor? shift, Tensor? residual, str activation, SymInt out_channels, SymInt[2] kernel_size, "
        "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  // The same on tensor cores, with what depends on the pattern alone made once: a tiling (numbers that choose the
  // kernel; none where tensor cores can't take the layer), a plan for it, and then any number of convolutions. Input,
  // output and residual are [N, C, H, W], or in lanes [N / 8, C, H, W, 8]. On CUDA cores, where tensor_cores is false,
  // a plan is for one size of input, all in [N, C, H, W].
  m.def("conv2d_tiling(Tensor col_indices, int vector, SymInt[4] input_size, SymInt out_channels, "
        "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
        "bool tensor_cores=True) -> int[]");
  m.def("conv2d_plan(Tensor crow_indices, Tensor col_indices, int[] tiling, int vector, SymInt[4] input_size, "
        "SymInt out_channels, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
        "SymInt groups) -> Tensor");
  m.def("conv2d_planned(Tensor input, Tensor values, Tensor plan, int[] tiling, Tensor? row_indices, Tensor? scale, "
        "Tensor? shift, Tensor? residual, str activation, bool to_lanes, SymInt out_channels, SymInt[2] kernel_size, "
        "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def("conv2d_input_grad(Tensor grad_output, Tensor values, Tensor crow_indices, Tensor col_indices, "
        "Tensor? row_indices, Tensor? transpose, SymInt[4] input_size, SymInt[2] kernel_size, SymInt[2] stride, "
        "SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def("conv2d_weight_grad(Tensor input, Tensor grad_output, Tensor crow_indices, Tensor col_indices, "
        "Tensor? row_indices, SymInt vector, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups) -> Tensor");
  // Two of each four input channels kept (sparsekd/sparse/formats_24.py), for the sparse tensor cores of CUDA.
  m.def("conv2d_24(Tensor input, Tensor values, Tensor metadata, Tensor? bias, SymInt out_channels, "
        "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def("conv2d_24_fused(Tensor input, Tensor values, Tensor metadata, Tensor? scale, Tensor? shift, Tensor? residual, "
        "str activation, SymInt out_channels, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
        "SymInt[2] dilation, SymInt groups) -> Tensor");
  // For inference; floats.
  m.def("max_pool2d(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding) -> Tensor");
  // input * gate(expand @ act(reduce @ mean over pixels + reduce_bias) + expand_bias); gate: sigmoid or hardsigmoid.
  m.def("squeeze_excite(Tensor input, Tensor reduce, Tensor? reduce_bias, Tensor expand, Tensor? expand_bias, "
        "str activation, str gate) -> Tensor");
  m.def("linear(Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? row_indices, "
        "Tensor? transpose, Tensor? bias, SymInt out_features) -> Tensor");
  m.def("linear_input_grad(Tensor grad_output, Tensor values, Tensor crow_indices, Tensor col_indices, "
        "Tensor? row_indices, Tensor? transpose, SymInt in_features) -> Tensor");
  m.def("linear_weight_grad(Tensor input, Tensor grad_output, Tensor crow_indices, Tensor col_indices, "
        "Tensor? row_indices, SymInt vector) -> Tensor");
  // The transposed pattern for conv2d_input_grad: [in_channels + 1 | n | n], see csrc/cpu/pattern.h.
  m.def("transpose_pattern(Tensor crow_indices, Tensor col_indices, Tensor? row_indices, int vector, "
        "int out_channels, int in_channels, int taps, int groups) -> Tensor");
  // (1 - alpha) * CE + alpha * T^2 * KL from raw logits; the gradient is made in the forward, in the dtype of the loss.
  m.def("kd_loss(Tensor student, Tensor teacher, Tensor? target, float temperature, float alpha, int ignore_index, "
        "float label_smoothing, bool distill_ignored) -> Tensor", &sparsekd::kd_loss);
  m.def("kd_loss_forward(Tensor student, Tensor teacher, Tensor? target, float temperature, float alpha, "
        "int ignore_index, float label_smoothing, bool distill_ignored, bool with_grad) -> (Tensor, Tensor)");
  // The same of two linear layers' outputs, hidden states [B, M, features] at a time so that no logits lie in memory as
  // a whole. D is forward_kl, reverse_kl or jsd(beta). wanted: gradients of student, student_weight, student_bias,
  // which are made in the forward, in the dtype of the loss, and are [0] where not wanted. chunk_rows: 0 for a size by
  // memory.
  m.def("linear_kd_loss(Tensor student, Tensor student_weight, Tensor? student_bias, Tensor teacher, "
        "Tensor teacher_weight, Tensor? teacher_bias, Tensor? target, float temperature, float alpha, str divergence, "
        "float beta, int ignore_index, float label_smoothing, bool distill_ignored, SymInt chunk_rows, bool[3] wanted) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  // hard * (sum of CE) + soft * T^2 * (sum of D) over rows of logits, in float64; with_grad: `student` becomes the
  // gradient. For the chunks of linear_kd_loss on the CPU.
  m.def("kd_loss_rows_(Tensor(a!) student, Tensor teacher, Tensor? target, float temperature, float hard, float soft, "
        "str divergence, float beta, int ignore_index, float label_smoothing, bool distill_ignored, bool with_grad) "
        "-> Tensor");
  // conv2d_planned of one layer and one size of its input, for the next calls.
  m.class_<sparsekd::PlannedConv2d>("PlannedConv2d")
      .def(torch::init<at::Tensor, std::vector<int64_t>, std::optional<at::Tensor>, std::optional<at::Tensor>,
                       std::string, std::vector<int64_t>, int64_t, std::vector<int64_t>, std::vector<int64_t>,
                       std::vector<int64_t>, std::vector<int64_t>, int64_t>())
      .def("run", &sparsekd::PlannedConv2d::run)
      .def("code_bytes", &sparsekd::PlannedConv2d::code_bytes)
      .def("in_place", &sparsekd::PlannedConv2d::in_place);
  // Several of them, one after the other.
  m.class_<sparsekd::PlannedSequence>("PlannedSequence")
      .def(torch::init<int64_t>())
      .def("conv2d", &sparsekd::PlannedSequence::conv2d)
      .def("max_pool2d", &sparsekd::PlannedSequence::max_pool2d)
      .def("shortcut", &sparsekd::PlannedSequence::shortcut)
      .def("squeeze_excite", &sparsekd::PlannedSequence::squeeze_excite)
      .def("average_pool", &sparsekd::PlannedSequence::average_pool)
      .def("flatten", &sparsekd::PlannedSequence::flatten)
      .def("linear", &sparsekd::PlannedSequence::linear)
      .def("dense_linear", &sparsekd::PlannedSequence::dense_linear)
      .def("output", &sparsekd::PlannedSequence::output, "",
           {torch::arg("places"), torch::arg("strips") = "auto", torch::arg("measure") = true})
      .def("in_strips", &sparsekd::PlannedSequence::in_strips)
      .def("run", &sparsekd::PlannedSequence::run);
  // Memory of activations that is used again in the next forward.
  m.class_<sparsekd::Arena>("Arena")
      .def(torch::init<>())
      .def("enter", &sparsekd::Arena::enter)
      .def("leave", &sparsekd::Arena::leave)
      .def("idle", &sparsekd::Arena::idle);
  // Bytes of the code of patterns that are trained (cpu/kept_code.h).
  m.def("kept_code_bytes() -> int", [] { return sparsekd::cpu::CodeStore::shared().bytes(); });
  // Bytes of ended results that wait for the next ones (result_pool.h), and their return to the system.
  m.def("results_idle() -> int", [] { return sparsekd::ResultPool::shared().idle(); });
  m.def("results_release() -> ()", [] { sparsekd::ResultPool::shared().release(); });
  // The instruction set that the CPU kernels use: baseline, avx2 or avx512.
  m.def("cpu_isa() -> str", [] { return std::string(sparsekd::cpu_isa()); });
  // Whether final patterns get code of their own (cpu/generated.h).
  m.def("generates_code() -> bool", &sparsekd::cpu::generates_code);
}
