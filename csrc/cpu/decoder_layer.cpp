#include "cpu/decoder_layer.h"

#include <cmath>
#include <vector>

#include "cpu/attention.h"
#include "cpu/beam_attention_int8.h"
#include "cpu/layer_norm.h"
#include "cpu/linear_act.h"
#include "cpu/linear_int8.h"
#include "cpu/step_attention.h"

namespace mplug2_fast {
namespace {

// Below this number of elements, waking another thread costs more than it saves: as in mplug2_fast/ops/runtime/cpu.py.
constexpr std::int64_t kWorkOfAThread = 1 << 15;

class Layer {
  public:
    Layer(Isa isa, const DecoderLayerArguments& a)
        : isa_(isa),
          a_(a),
          rows_(a.batch * a.beams),
          dim_(a.heads * a.head_dim),
          scratch_(rows_ * (6 * dim_ + (3 * dim_ > a.hidden ? 3 * dim_ : a.hidden)) * size()) {}

    void run() {
        char* next = scratch_.data();
        const auto take = [&](std::int64_t channels) {
            char* taken = next;
            next += rows_ * channels * size();
            return taken;
        };
        char *normed = take(dim_), *context = take(dim_), *sums = take(dim_), *again = take(dim_), *query = take(dim_),
             *other = take(dim_);
        char* wide = next;

        norm(a_.x, a_.norm, normed);
        linear(normed, a_.qkv, wide, dim_, 3 * dim_);
        attend_self(wide, context);
        linear(context, a_.self_out, sums, dim_, dim_, normed);

        norm(sums, a_.self_norm, again);
        linear(again, a_.query, query, dim_, dim_);
        attend_memory(query, context);
        linear(context, a_.cross_out, sums, dim_, dim_, again);

        norm(sums, a_.cross_norm, other);
        linear(other, a_.fc, wide, dim_, a_.hidden, nullptr, a_.activation);
        linear(wide, a_.proj, a_.out, a_.hidden, dim_, other);
    }

  private:
    std::int64_t size() const { return a_.bf16 ? 2 : 4; }

    int threads(std::int64_t work) const {
        const std::int64_t useful = work / kWorkOfAThread;
        return useful < 1 ? 1 : useful < a_.threads ? static_cast<int>(useful) : a_.threads;
    }

    void norm(const void* x, const WeightAndBias& of, void* out) const {
        layer_norm(isa_, {x, nullptr, of.weight, of.bias, out, nullptr, 1, rows_, dim_, 0, dim_, 0, 0, 1.0f, a_.eps,
                          a_.bf16, threads(rows_ * dim_)});
    }

    void linear(const void* x, const WeightAndBias& of, void* out, std::int64_t inputs, std::int64_t outputs,
                const void* residual = nullptr, Activation activation = Activation::none) const {
        const int threads = this->threads(inputs * outputs);
        if (of.scale) {
            linear_int8(isa_, {x, static_cast<const std::int8_t*>(of.weight), of.scale, of.bias, residual, out, rows_,
                               inputs, outputs, inputs, activation, 16, a_.bf16, threads});
        } else {
            linear_act(isa_, {x, of.weight, of.bias, residual, out, rows_, inputs, outputs, inputs, activation, a_.bf16,
                              threads});
        }
    }

    void attend_self(const char* qkv, void* out) const {
        const std::int64_t row = 3 * dim_, bytes = dim_ * size();
        step_attention(isa_, {qkv,
                              qkv + bytes,
                              qkv + 2 * bytes,
                              a_.keys,
                              a_.values,
                              a_.ancestors,
                              out,
                              rows_,
                              a_.heads,
                              a_.head_dim,
                              a_.step,
                              {row, a_.head_dim},
                              {row, a_.head_dim},
                              {row, a_.head_dim},
                              {a_.keys_strides[0], a_.keys_strides[1], a_.keys_strides[2]},
                              {a_.values_strides[0], a_.values_strides[1], a_.values_strides[2]},
                              {a_.ancestors_strides[0], a_.ancestors_strides[1]},
                              scale(),
                              a_.bf16,
                              threads(rows_ * dim_ * (a_.step + 1) / 8)});
    }

    // Strides of the memory are of batch, head and token, those of `attention` of batch, token and head.
    void attend_memory(const void* query, void* out) const {
        const int threads = this->threads(rows_ * dim_ * a_.tokens / 8);
        if (a_.memory_key_scale) {
            beam_attention_int8(isa_, {query,
                                       static_cast<const std::int8_t*>(a_.memory_key),
                                       a_.memory_key_scale,
                                       static_cast<const std::int8_t*>(a_.memory_value),
                                       a_.memory_value_scale,
                                       a_.mask,
                                       out,
                                       a_.batch,
                                       a_.beams,
                                       a_.tokens,
                                       a_.heads,
                                       a_.head_dim,
                                       {a_.beams * dim_, dim_, a_.head_dim},
                                       scale(),
                                       a_.bf16,
                                       threads});
            return;
        }
        attention(isa_, {query,
                         a_.memory_key,
                         a_.memory_value,
                         out,
                         a_.mask,
                         a_.batch,
                         a_.beams,
                         a_.tokens,
                         a_.heads,
                         a_.head_dim,
                         {a_.beams * dim_, dim_, a_.head_dim},
                         {a_.memory_key_strides[0], a_.memory_key_strides[2], a_.memory_key_strides[1]},
                         {a_.memory_value_strides[0], a_.memory_value_strides[2], a_.memory_value_strides[1]},
                         a_.tokens,
                         scale(),
                         false,
                         a_.bf16,
                         threads});
    }

    float scale() const { return 1.0f / std::sqrt(static_cast<float>(a_.head_dim)); }

    const Isa isa_;
    const DecoderLayerArguments& a_;
    const std::int64_t rows_, dim_;
    std::vector<char> scratch_;
};

}  // namespace

void decoder_layer(Isa isa, const DecoderLayerArguments& arguments) {
    Layer(isa, arguments).run();
}

}  // namespace mplug2_fast
