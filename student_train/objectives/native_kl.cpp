// KL with temperature and CE of the exact soft target, with their gradient, over rows of logits on a CPU.
// native_kl.py builds, loads and calls this file. The formulas are those of kl_loss.exact_kernel.
//
// There are three passes over a row, which stays in the cache: maxima; exponentials and their sums; gradient.
// Sums have a fixed order.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.hpp"

namespace {

constexpr int SLOTS = 4;

struct Sums {
    Floats slots[SLOTS] = {};
    double total() const {
        double all = 0.0;
        for (const Floats& slot : slots)
            for (int i = 0; i < LANES; ++i) all += slot[i];
        return all;
    }
};

// A row of logits: products with the decoder's weight, to which the bias is added when they are read.
template <class Kind>
struct Logits {
    const typename Kind::Stored* products;
    const float* bias;

    ALWAYS_INLINE Floats at(int64_t v) const { return Kind::load(products + v) + Float32::load(bias + v); }

    // The `count` < LANES logits from v. Other lanes are -1e30: the exponential is 0, and the difference from a
    // maximum is finite.
    Floats part(int64_t v, int64_t count) const {
        typename Kind::Stored stored[LANES] = {};
        float biases[LANES] = {};
        std::memcpy(stored, products + v, count * sizeof *stored);
        std::memcpy(biases, bias + v, count * sizeof *biases);
        Floats logits = Kind::load(stored) + Float32::load(biases);
        for (int64_t i = count; i < LANES; ++i) logits.set(i, -1e30f);
        return logits;
    }
};

// Calls `work` for every full vector of a row, SLOTS vectors at a time, each with its own slot for sums.
template <class Kind, class Work>
inline ALWAYS_INLINE void each(const Logits<Kind>& s, const Logits<Kind>& t, int64_t V, Work work) {
    int64_t v = 0;
    for (; v + SLOTS * LANES <= V; v += SLOTS * LANES)
#pragma GCC unroll 4
        for (int slot = 0; slot < SLOTS; ++slot)
            work(s.at(v + slot * LANES), t.at(v + slot * LANES), v + slot * LANES, slot);
    for (; v + LANES <= V; v += LANES) work(s.at(v), t.at(v), v, 0);
}

inline float largest(Floats v) {
    float all = v[0];
    for (int i = 1; i < LANES; ++i) all = v[i] > all ? v[i] : all;
    return all;
}

// Finds the largest logit of both rows; `s_rest` and `t_rest` are their last, partly filled vectors.
template <class Kind>
void maxima(const Logits<Kind>& s, const Logits<Kind>& t, int64_t V, Floats s_rest, Floats t_rest, float& s_max,
            float& t_max) {
    Floats s_largest[SLOTS], t_largest[SLOTS];
    for (int slot = 0; slot < SLOTS; ++slot) s_largest[slot] = t_largest[slot] = Floats{} - INFINITY;
    each<Kind>(s, t, V, [&](Floats a, Floats b, int64_t, int slot) ALWAYS_INLINE {
        s_largest[slot] = larger(a, s_largest[slot]);
        t_largest[slot] = larger(b, t_largest[slot]);
    });
    for (int slot = 1; slot < SLOTS; ++slot) {
        s_largest[0] = larger(s_largest[slot], s_largest[0]);
        t_largest[0] = larger(t_largest[slot], t_largest[0]);
    }
    s_max = largest(larger(s_rest, s_largest[0]));
    t_max = largest(larger(t_rest, t_largest[0]));
}

// How exp(s), which CE needs, follows from e = exp(s / T): it is not needed, is e, e squared, or another exponential.
enum MlmExponential { NOT_NEEDED, SAME, SQUARE, OTHER };

struct Row {
    int64_t V, label;
    float kl_scale, mlm_scale, temperature;
    float kl, ce;
};

// Writes KL and CE of a row to `row`. The gradient overwrites the student's products. `exponentials`: a buffer.
template <class Kind, MlmExponential form>
void exact_row(typename Kind::Stored* gradient, const Logits<Kind>& s, const Logits<Kind>& t, Row& row,
               Floats* exponentials) {
    const int64_t whole = row.V / LANES * LANES, rest = row.V - whole;
    const Floats s_rest = s.part(whole, rest), t_rest = t.part(whole, rest);

    float s_max, t_max;
    maxima<Kind>(s, t, row.V, s_rest, t_rest, s_max, t_max);

    const float scale = float(1.0 / (double(row.temperature) * M_LN2)), scale_1 = float(1.0 / M_LN2);
    auto e_1_of = [&](Floats a, Floats e_T) ALWAYS_INLINE {
        if (form == SAME) return e_T;
        if (form == SQUARE) return e_T * e_T;
        return exp2_of((a - s_max) * scale_1);
    };
    Sums z_T, z_1, z_f, cross;  // cross: sum of f (y - x)
    auto sums = [&](Floats a, Floats b, int64_t v, int slot) ALWAYS_INLINE {
        Floats x = (a - s_max) * scale, y = (b - t_max) * scale;
        Floats e_T = exp2_of(x), f = exp2_of(y);
        exponentials[v / LANES * 2] = e_T;
        exponentials[v / LANES * 2 + 1] = f;
        z_T.slots[slot] += e_T;
        z_f.slots[slot] += f;
        cross.slots[slot] += f * (y - x);
        if (form != NOT_NEEDED) z_1.slots[slot] += e_1_of(a, e_T);
    };
    each<Kind>(s, t, row.V, sums);
    if (rest) sums(s_rest, t_rest, whole, 0);
    const double sum_T = z_T.total(), sum_f = z_f.total(), sum_1 = z_1.total();
    row.kl = float(cross.total() * M_LN2 / sum_f - std::log(sum_f) + std::log(sum_T));

    const bool labelled = form != NOT_NEEDED && row.label >= 0;
    const float at_label = labelled ? s.part(row.label, 1)[0] : 0.0f;
    row.ce = labelled ? float(std::log(sum_1) - (double(at_label) - s_max)) : 0.0f;

    const float q = float(row.kl_scale / sum_T), p = float(row.kl_scale / sum_f);
    const float q_1 = labelled ? float(row.mlm_scale / sum_1) : 0.0f;
    auto gradient_of = [&](Floats a, int64_t v) ALWAYS_INLINE {
        Floats e_T = exponentials[v / LANES * 2], f = exponentials[v / LANES * 2 + 1];
        Floats sum = q * e_T - p * f;
        if (form != NOT_NEEDED) sum += q_1 * e_1_of(a, e_T);
        return sum;
    };
    auto gradients = [&](Floats a, Floats, int64_t v, int) ALWAYS_INLINE { Kind::store(gradient + v, gradient_of(a, v)); };
    each<Kind>(s, t, row.V, gradients);
    typename Kind::Stored part[LANES];
    if (rest) {
        Kind::store(part, gradient_of(s_rest, whole));
        std::memcpy(gradient + whole, part, rest * sizeof *part);
    }
    if (labelled) {  // recomputed with the one-hot part, so that the sum is rounded only once
        const int64_t lane = row.label % LANES;
        Kind::store(part, gradient_of(Floats{} + at_label, row.label) - row.mlm_scale);
        gradient[row.label] = part[lane];
    }
}

template <class Kind, MlmExponential form>
void exact_rows(void* s, const float* s_bias, const void* t, const float* t_bias, const int64_t* labels, const float* kl_scales,
                const float* mlm_scales, int64_t N, int64_t V, float temperature, float* kl, float* ce) {
    typedef typename Kind::Stored Stored;
    std::vector<float> buffer((V / LANES + 2) * 2 * LANES);  // exponentials of a row
    auto exponentials = reinterpret_cast<Floats*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
    for (int64_t n = 0; n < N; ++n) {
        Row row = {V, labels[n], kl_scales[n], mlm_scales[n], temperature, 0.0f, 0.0f};
        Stored* s_row = static_cast<Stored*>(s) + n * V;
        const Logits<Kind> student = {s_row, s_bias}, teacher = {static_cast<const Stored*>(t) + n * V, t_bias};
        exact_row<Kind, form>(s_row, student, teacher, row, exponentials);
        kl[n] = row.kl;
        ce[n] = row.ce;
    }
}

template <class Kind>
void exact(void* s, const float* s_bias, const void* t, const float* t_bias, const int64_t* labels,
           const float* kl_scales, const float* mlm_scales, int64_t N, int64_t V, float temperature, int mlm,
           float* kl, float* ce) {
    auto rows = !mlm                  ? exact_rows<Kind, NOT_NEEDED>
                : temperature == 1.0f ? exact_rows<Kind, SAME>
                : temperature == 2.0f ? exact_rows<Kind, SQUARE>
                                      : exact_rows<Kind, OTHER>;
    rows(s, s_bias, t, t_bias, labels, kl_scales, mlm_scales, N, V, temperature, kl, ce);
}

}  // namespace

// s [N, V]: products with the student's decoder weight, overwritten by the gradient. t [N, V]: the teacher's products.
// Biases: [V]. labels [N]: negative if a row has none. kl_scales, mlm_scales: [N]. kl, ce [N]: written.
extern "C" void exact_float32(void* s, const float* s_bias, const void* t, const float* t_bias, const int64_t* labels,
                              const float* kl_scales, const float* mlm_scales, int64_t N, int64_t V,
                              float temperature, int mlm, float* kl, float* ce) {
    exact<Float32>(s, s_bias, t, t_bias, labels, kl_scales, mlm_scales, N, V, temperature, mlm, kl, ce);
}

extern "C" void exact_bfloat16(void* s, const float* s_bias, const void* t, const float* t_bias, const int64_t* labels,
                               const float* kl_scales, const float* mlm_scales, int64_t N, int64_t V,
                               float temperature, int mlm, float* kl, float* ce) {
    exact<Bfloat16>(s, s_bias, t, t_bias, labels, kl_scales, mlm_scales, N, V, temperature, mlm, kl, ce);
}
