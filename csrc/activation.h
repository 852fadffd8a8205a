// What may follow a convolution, as in torch.nn.functional.
#pragma once

namespace sparsekd {

enum class Activation : int { none, relu, relu6, silu, hardswish };

}  // namespace sparsekd
