#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace mplug2_fast {

// One step of beam search: of all words after all beams the `beams` with the highest scores, best first, with
//   score = (cumulative[b, i] + log_softmax(logits[b, i])[word]) / penalty,
// where `blocked`, a word or -1, has the log-probability -1e20. Equal scores: the lower beam, then the lower word first
// (of each beam, the words with the highest logits are considered). A score that is no number counts as -inf; the beams
// and words that are told always exist.
//
// `logits` is (batch, beams, words) with strides in elements for the first two and contiguous words, bfloat16 or
// float32; `cumulative` (batch, beams) float32, -inf for a dead beam. All that is written is (batch, beams):
// `new_cumulative` = score * penalty, and `origin` and `token`, the beam and the word. Outputs must not overlap inputs.
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
