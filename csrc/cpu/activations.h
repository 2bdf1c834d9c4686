#pragma once

namespace mplug2_fast {

// gelu is the erf form, quick_gelu is x * sigmoid(1.702 x).
enum class Activation { none, gelu, quick_gelu };

}  // namespace mplug2_fast
