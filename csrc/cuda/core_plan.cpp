#include "core_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "planar_host.h"

namespace sparsekd::cuda {
namespace {

struct Sizes {
  int64_t records, slices, starts;
  int64_t ints() const { return 2 * records + starts + slices; }
};

Sizes sizes_of(const Problem& problem, const Choice& c, int64_t n_vectors) {
  const int64_t per_group = slices_of(problem, c), slices = problem.row_groups * per_group;
  return {n_vectors * per_group, slices, slices * (ceil_div(problem.channels_per_group(), c.block_channels) + 1)};
}

struct Planned {
  Problem problem;
  Choice choice;
};

std::vector<int64_t> numbers_of(const Planned& planned, int64_t n_vectors) {
  const auto& [problem, c] = planned;
  const Sizes sizes = sizes_of(problem, c, n_vectors);
  return {c.variant.vector, c.variant.lane_groups, c.variant.plane ? c.variant.plane : c.plane, c.row_pitch,
          c.phase_pitch[0], c.phase_pitch[1], c.block_channels, sizes.slices, sizes.starts, problem.flat};
}

// For float32 results in planes, one behind the other; it fits other dtypes, too, if not as well, but where planes are
// flat.
std::optional<Planned> choice_of(const TensorDevice& device, const Problem& given, int64_t n_vectors) {
  const Problem problem = has_flat_planes(given) ? flattened(given) : given;
  const auto options = at::TensorOptions(at::kMeta).dtype(at::kFloat);
  const std::optional<Choice> chosen =
      choose(device, problem, n_vectors,
             at::empty({given.batch, given.out_channels, given.axes[0].positions, given.axes[1].positions}, options));
  return chosen ? std::optional<Planned>({problem, *chosen}) : std::nullopt;
}

Planned planned_choice(Call& call, const Problem& given, int64_t n_vectors, at::IntArrayRef tiling,
                       const at::Tensor& on) {
  const std::optional<Planned> planned = choice_of(tensor_device(call, on), given, n_vectors);
  TORCH_CHECK_VALUE(planned && tiling.equals(numbers_of(*planned, n_vectors)),
                    "Expected a tiling that conv2d_tiling gives for this pattern and an input of this size, got ",
                    tiling);
  return *planned;
}

// As flat planes are read.
at::Tensor as_flat(Call& call, const at::Tensor& t) {
  const at::Tensor planes = planar(call, t).contiguous();
  return is_flat(planes) ? planes : planes.clone();
}

}  // namespace

Problem core_problem(const Conv2dShape& shape, int64_t vector) {
  TORCH_CHECK_VALUE(vector >= 1, "Expected V of at least 1, got V = ", vector);
  TORCH_CHECK_VALUE(shape.out_channels >= shape.groups && shape.out_channels % shape.groups == 0,
                    "Expected a number of output channels divisible by groups, got ", shape.out_channels,
                    " and groups=", shape.groups);
  return {shape.batch, shape.in_channels, shape.out_channels, shape.groups, vector,
          shape.groups * ceil_div(shape.out_channels / shape.groups, vector),
          {forward_axis(shape, 0), forward_axis(shape, 1)}};
}

std::vector<int64_t> core_tiling(Call& call, const Problem& problem, const at::Tensor& col) {
  if (problem.batch == 0 || problem.axes[0].positions == 0 || problem.axes[1].positions == 0) return {};
  const std::optional<Planned> planned = choice_of(tensor_device(call, col), problem, col.size(0));
  return planned ? numbers_of(*planned, col.size(0)) : std::vector<int64_t>{};
}

at::Tensor make_core_plan(Call& call, const Problem& given, at::IntArrayRef tiling, const at::Tensor& crow,
                          const at::Tensor& col) {
  const auto [problem, c] = planned_choice(call, given, col.size(0), tiling, col);
  const Sizes sizes = sizes_of(problem, c, col.size(0));
  RecordsParams p = records_params(problem, {{}, crow, col, {}, {}, {}}, c, int(slices_of(problem, c)));
  // Where no record is, the plan points at the first value.
  const at::Tensor plan = at::zeros({sizes.ints()}, crow.options());
  call.updates(plan, "plan");
  auto* numbers = plan.mutable_data_ptr<int32_t>();
  p.records = reinterpret_cast<unsigned char*>(numbers);
  p.starts = numbers + 2 * sizes.records;
  p.order = p.starts + sizes.starts;
  p.slots = true;
  call.launched(sparsekd_records(&p, 1, call.stream()));
  return plan;
}

at::Tensor run_core_plan(const at::Tensor& input, const at::Tensor& values, const at::Tensor& plan,
                         at::IntArrayRef tiling, const OptionalTensor& rows, const OptionalTensor& residual,
                         Finish finish, const Conv2dShape& shape) {
  const int64_t n_vectors = values.size(0);
  Call call(input);
  const auto [problem, c] = planned_choice(call, core_problem(shape, values.size(1)), n_vectors, tiling, input);
  TORCH_CHECK_TYPE(!problem.flat || input.scalar_type() == at::kFloat,
                   "Expected input of dtype Float by a plan for planes as they lie, got ", input.scalar_type());
  const Sizes sizes = sizes_of(problem, c, n_vectors);
  check_size(plan, "plan", 0, sizes.ints(), "numbers that this tiling's plan has");
  const auto format = input.suggest_memory_format();
  const at::Tensor output = at::empty(shape.output_size(), input.options().memory_format(format));
  if (residual) check_residual(*residual, output.sizes(), input);
  if (output.numel() == 0) return output;
  const bool in_planes = output.is_contiguous();
  const at::Tensor planes = in_planes ? output : at::empty(output.sizes(), input.options());
  if (residual) finish.residual = problem.flat ? as_flat(call, *residual) : planar(call, *residual).contiguous();

  const int kernel_vector = c.variant.vector;
  const at::Tensor records = at::empty({std::max<int64_t>(sizes.records, 1), record_bytes(kernel_vector)},
                                       input.options().dtype(at::kByte));
  call.reads(input, "input");
  call.reads(values, "values");
  call.reads(plan, "plan");
  if (rows) call.reads(*rows, "row_indices");
  call.reads(finish.scale, "scale");
  call.reads(finish.shift, "shift");
  call.reads(finish.residual, "residual");
  call.writes(records, "records");
  call.writes(planes, "output");
  const auto* numbers = plan.const_data_ptr<int32_t>();
  const FillRecordsParams fill{numbers, data_of(values), dtype_of(values), int(sizes.records), int(n_vectors),
                               int(problem.vector), int(slices_of(problem, c)), kernel_vector,
                               records.mutable_data_ptr<uint8_t>()};
  const at::Tensor lanes = problem.flat ? as_flat(call, input)
                                        : to_lanes(call, c.lanes, problem.axes, input, "lanes", fill);
  if (problem.flat) fill_records(call, fill);
  const int64_t starts = 2 * sizes.records, order = starts + sizes.starts;
  const Records made{records, plan.narrow(0, starts, sizes.starts), plan.narrow(0, order, sizes.slices)};
  run_prepared(call, problem, c, n_vectors, lanes, rows.value_or(at::Tensor()), made, finish, planes);
  if (!in_planes) {
    call.writes(output, "output");
    to_channels_last(call, planes, output);
  }
  call.finish();
  return output;
}

}  // namespace sparsekd::cuda

int sparsekd_core_cycles(const int64_t* sizes, const int* device, int* flat, double* cycles) {
  using namespace sparsekd;
  using namespace sparsekd::cuda;
  const auto [batch, in_channels, out_channels, vector, n_vectors, size, kernel, stride] =
      *reinterpret_cast<const std::array<int64_t, 8>*>(sizes);
  const int64_t padding = kernel / 2, input[] = {batch, in_channels, size * stride, size * stride};
  const int64_t both[][2] = {{kernel, kernel}, {stride, stride}, {padding, padding}, {1, 1}};
  const Conv2dShape shape = checked_shape(input, out_channels, both[0], both[1], both[2], both[3], 1);
  const auto planned = choice_of({device[0], device[1], device[2]}, core_problem(shape, vector), n_vectors);
  if (!planned) return 0;
  *flat = planned->problem.flat;
  *cycles = planned->choice.cost;
  return 1;
}
