// The attention-relation loss and its gradient on a CPU. native_relations.py builds, loads and calls this file. The
// formulas are those of relations._chunk.
//
// A block of ROWS rows of both score matrices is computed, compared and turned into its part of the gradient while it
// is in the cache. Padding is not computed. Sums have a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.hpp"

namespace {

constexpr int ROWS = WIDTH == 16 ? 8 : 4;  // rows of a block: their sums fill half the registers
constexpr float LOWEST = -1e30f;           // below every score, but its difference from a score is finite

inline int64_t rounded_up(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// Reduces a vector to one number: `work` combines its halves until one number is left.
template <int COUNT, class Work>
inline ALWAYS_INLINE float reduced(const float* lanes, Work work) {
    if constexpr (COUNT == 2) {
        return work(lanes[0], lanes[1]);
    } else {
        typedef float Half __attribute__((vector_size(COUNT * sizeof(float) / 2)));
        Half low, high;
        std::memcpy(&low, lanes, sizeof low);
        std::memcpy(&high, lanes + COUNT / 2, sizeof high);
        const Half both = work(low, high);
        return reduced<COUNT / 2>(reinterpret_cast<const float*>(&both), work);
    }
}

template <class Work>
inline ALWAYS_INLINE float reduced(Floats v, Work work) {
    float lanes[LANES];  // a copy, so that v can stay in registers
    v.store(lanes);
    return reduced<LANES>(lanes, work);
}

inline ALWAYS_INLINE float total(Floats v) {
    return reduced(v, [](auto a, auto b) ALWAYS_INLINE { return a + b; });
}

inline ALWAYS_INLINE float largest(Floats v) {
    return reduced(v, [](auto a, auto b) ALWAYS_INLINE { return a > b ? a : b; });
}

// The queries, keys or values x of one sequence and head, by row [n, d] and by column [d, n], zero beyond n and d.
struct Vectors {
    int64_t d, row, column;  // d of x, and the strides of by_row and of by_column
    std::vector<float> by_row, by_column;

    Vectors(int64_t longest, int64_t d) : d(d), row(rounded_up(d)), column(rounded_up(longest)) {
        by_row.resize(column * row);
        by_column.resize(column * d);
    }

    template <class Kind>
    void read(const typename Kind::Stored* from, int64_t stride, int64_t n) {
        for (int64_t j = 0; j < n; ++j)
            for (int64_t k = 0; k < d; ++k) by_row[j * row + k] = Kind::widen(from[j * stride + k]);
        std::fill(by_row.begin() + n * row, by_row.begin() + rounded_up(n) * row, 0.0f);
        for (int64_t k = 0; k < d; ++k)
            for (int64_t j = 0; j < rounded_up(n); ++j) by_column[k * column + j] = by_row[j * row + k];
    }

    // Writes the products of ROWS rows from `first` with all n rows to `scores` [ROWS, column].
    void scores(int64_t first, int64_t n, float* scores) const {
        for (int64_t j = 0; j < n; j += LANES) {
            Floats sums[ROWS] = {};
            for (int64_t k = 0; k < d; ++k) {
                const Floats others = Floats::load(&by_column[k * column + j]);
                const float* mine = &by_row[first * row + k];
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) sums[r] += others * mine[r * row];
            }
            for (int r = 0; r < ROWS; ++r) sums[r].store(scores + r * column + j);
        }
        for (int r = 0; r < ROWS; ++r) std::fill(scores + r * column + n, scores + r * column + rounded_up(n), LOWEST);
    }
};

// Writes the largest score of every row of a block to `result`.
inline ALWAYS_INLINE void maxima(const float* scores, int64_t column, int64_t n, float* result) {
    for (int r = 0; r < ROWS; ++r) {
        Floats lanes = Floats{} + LOWEST;
        for (int64_t j = 0; j < n; j += LANES) lanes = larger(Floats::load(scores + r * column + j), lanes);
        result[r] = largest(lanes);
    }
}

// Adds the KL of a block's rows to `kl`, and overwrites the student's products `s` by their gradient. Every pass covers
// all rows, so that sums of several rows are computed at the same time. Rows beyond n are zero on both sides, so their
// KL and gradient are zero.
void compare(float* s, float* t, int64_t column, int64_t n, float s_scale, float t_scale, double& kl) {
    float s_max[ROWS], t_max[ROWS], s_sum[ROWS], t_sum[ROWS], difference[ROWS];
    maxima(s, column, n, s_max);
    maxima(t, column, n, t_max);
    const float s_factor = s_scale / float(M_LN2), t_factor = t_scale / float(M_LN2);
    for (int r = 0; r < ROWS; ++r) {
        Floats s_sums = {}, t_sums = {}, cross = {};  // cross: sum of f (y - x)
        for (int64_t j = r * column; j < r * column + n; j += LANES) {
            const Floats x = (Floats::load(s + j) - s_max[r]) * s_factor;
            const Floats y = (Floats::load(t + j) - t_max[r]) * t_factor;
            const Floats e = exp2_of(x), f = exp2_of(y);
            s_sums += e;
            t_sums += f;
            cross += f * (y - x);
            e.store(s + j);
            f.store(t + j);
        }
        s_sum[r] = total(s_sums);
        t_sum[r] = total(t_sums);
        difference[r] = total(cross);
    }
    for (int r = 0; r < ROWS; ++r) {
        const float q = s_scale / s_sum[r], p = s_scale / t_sum[r];
        for (int64_t j = r * column; j < r * column + n; j += LANES)
            (Floats::load(s + j) * q - Floats::load(t + j) * p).store(s + j);
        kl += double(difference[r]) * M_LN2 / t_sum[r] + std::log(double(s_sum[r]) / t_sum[r]);
    }
}

// Adds a block's part of (G + G^T) x, where G is the gradient with respect to the products: the block's rows of G x go
// to `by_row`, its share of G^T x is added to `by_column`.
void add_gradient(const float* G, const Vectors& x, int64_t first, int64_t n, float* by_row, float* by_column) {
    for (int64_t k = 0; k < x.d; k += LANES) {
        Floats sums[ROWS] = {};
        for (int64_t j = 0; j < n; ++j) {
            const Floats others = Floats::load(&x.by_row[j * x.row + k]);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sums[r] += others * G[r * x.column + j];
        }
        for (int r = 0; r < ROWS; ++r) sums[r].store(by_row + (first + r) * x.row + k);
    }
    for (int64_t j = 0; j < n; j += LANES) {
        Floats rows[ROWS];
        for (int r = 0; r < ROWS; ++r) rows[r] = Floats::load(G + r * x.column + j);
        for (int64_t k = 0; k < x.d; ++k) {
            Floats sum = Floats::load(by_column + k * x.column + j);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) sum += rows[r] * x.by_row[(first + r) * x.row + k];
            sum.store(by_column + k * x.column + j);
        }
    }
}

// Student's and teacher's side of one relation. s_width, t_width: D, the numbers of a position in all heads.
template <class Kind>
struct Relation {
    typedef typename Kind::Stored Stored;
    const Stored *student, *teacher;
    Stored* gradient;  // null if no gradient is needed
    const int64_t* counts;
    int64_t length, heads, s_width, t_width;
    Vectors x, t;
    std::vector<float> s_scores, t_scores, by_row, by_column;

    Relation(const void* student, const void* teacher, void* gradient, const int64_t* counts, int64_t length,
             int64_t heads, int64_t s_width, int64_t t_width)
        : student(static_cast<const Stored*>(student)), teacher(static_cast<const Stored*>(teacher)),
          gradient(static_cast<Stored*>(gradient)), counts(counts), length(length), heads(heads), s_width(s_width),
          t_width(t_width), x(length, s_width / heads), t(length, t_width / heads), s_scores(ROWS * x.column),
          t_scores(ROWS * x.column), by_row(x.by_row.size()), by_column(x.by_column.size()) {}

    double kl_of(int64_t sequence, int64_t head) {
        const int64_t n = std::clamp<int64_t>(counts[sequence], 0, length);
        const int64_t s_at = sequence * length * s_width + head * x.d;
        x.template read<Kind>(student + s_at, s_width, n);
        t.template read<Kind>(teacher + sequence * length * t_width + head * t.d, t_width, n);
        std::fill(by_column.begin(), by_column.end(), 0.0f);
        const float s_scale = float(1 / std::sqrt(double(x.d))), t_scale = float(1 / std::sqrt(double(t.d)));
        double sum = 0.0;
        for (int64_t first = 0; first < n; first += ROWS) {
            x.scores(first, n, s_scores.data());
            t.scores(first, n, t_scores.data());
            compare(s_scores.data(), t_scores.data(), x.column, n, s_scale, t_scale, sum);
            if (gradient) add_gradient(s_scores.data(), x, first, n, by_row.data(), by_column.data());
        }
        if (gradient) write(gradient + s_at, n);
        return sum;
    }

    void write(Stored* to, int64_t n) const {
        for (int64_t j = 0; j < length; ++j)
            for (int64_t k = 0; k < x.d; k += LANES) {
                const int64_t count = std::min<int64_t>(LANES, x.d - k);
                float sums[LANES] = {};
                Stored numbers[LANES];
                if (j < n)
                    for (int64_t i = 0; i < count; ++i)
                        sums[i] = by_row[j * x.row + k + i] + by_column[(k + i) * x.column + j];
                Kind::store(numbers, Floats::load(sums));
                std::memcpy(to + j * s_width + k, numbers, count * sizeof *numbers);
            }
    }
};

template <class Kind>
void relations(const void* student, const void* teacher, void* gradient, const int64_t* counts, int64_t length,
               int64_t heads, int64_t s_width, int64_t t_width, int64_t begin, int64_t end, double* kl) {
    Relation<Kind> relation(student, teacher, gradient, counts, length, heads, s_width, t_width);
    for (int64_t i = begin; i < end; ++i) kl[i] = relation.kl_of(i / heads, i % heads);
}

}  // namespace

// student: [B, length, s_width]. teacher: [B, length, t_width]. counts [B]: positions without padding. gradient: null,
// or of the student's shape. kl: [B heads]. Only the pairs (sequence, head) numbered `begin` to `end` are computed.
extern "C" void relation_float32(const void* student, const void* teacher, void* gradient, const int64_t* counts,
                                 int64_t length, int64_t heads, int64_t s_width, int64_t t_width, int64_t begin,
                                 int64_t end, double* kl) {
    relations<Float32>(student, teacher, gradient, counts, length, heads, s_width, t_width, begin, end, kl);
}

extern "C" void relation_bfloat16(const void* student, const void* teacher, void* gradient, const int64_t* counts,
                                  int64_t length, int64_t heads, int64_t s_width, int64_t t_width, int64_t begin,
                                  int64_t end, double* kl) {
    relations<Bfloat16>(student, teacher, gradient, counts, length, heads, s_width, t_width, begin, end, kl);
}
