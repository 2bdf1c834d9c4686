#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// One step of beam search: the `beams` best continuations among all beams and words, best first, with
//   score = (cumulative[b, i] + log_softmax(logits[b, i])[word]) / penalty,
// where `blocked`, a word or -1, has the log-probability -1e20. Among equal scores the lower beam, then the lower word
// is first (only the words with the highest logits of each beam are considered). NaN scores count as -inf. The returned
// beams and words always exist.
//
// `logits` is (batch, beams, words) with strides in elements for the first two and contiguous words, bfloat16 or
// float32; `cumulative` (batch, beams) float32, -inf for a dead beam. The outputs are (batch, beams):
// `new_cumulative` = score * penalty, and `origin` and `token`, the beam and the word. They must not overlap inputs.
struct BeamStepArguments {
    const void* logits;
    const float* cumulative;
    float* scores;
    float* new_cumulative;
    std::int64_t* origin;
    std::int64_t* token;
    std::int64_t batch, beams, words;
    std::int64_t batch_stride, beam_stride;
    std::int64_t blocked;
    float penalty;
    bool bf16;
    int threads;
};

MPLUG2_KERNEL(beam_step, BeamStepArguments)

}  // namespace mplug2_fast
