// Top-k and logsumexp of rows of logits on a CPU; reduction_kernel.py builds, loads and calls it.
//
// Pass 1 takes the maximum of every GROUP-th entry: GROUP maxima of which the k-th largest is at most the
// k-th largest entry of the row, so only groups that reach it are searched. Pass 2 sums exponentials.
// Sums are in one fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "vectors.hpp"

namespace {

constexpr int GROUP = 1024, VECTORS = GROUP / LANES;

// The last entries of a row as a whole vector, -inf past its end.
template <class Kind>
Floats load_part(const typename Kind::Stored* p, int64_t count) {
    Floats v = Floats{} - INFINITY;
    for (int64_t i = 0; i < count; ++i) v.set(i, Kind::widen(p[i]));
    return v;
}

// Monotone: a < b as floats exactly where key(a) < key(b); both zeros are one.
int32_t key(float value) {
    int32_t bits;
    value += 0.0f;
    std::memcpy(&bits, &value, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

float value_of(int32_t key) {
    int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

double total(const Floats (&sums)[4]) {
    double all = 0.0;
    for (const Floats& sum : sums)
        for (int i = 0; i < LANES; ++i) all += sum[i];
    return all;
}

// Sums over the row of exp((x - maximum) / temperature) and, where `squared`, of its square.
template <class Kind, bool squared>
void exponentials(const typename Kind::Stored* row, int64_t V, float maximum, float temperature, double* sums) {
    const float scale = float(1.0 / (double(temperature) * M_LN2));
    Floats once[4] = {}, twice[4] = {};
    auto add = [&](Floats x, int slot) ALWAYS_INLINE {
        Floats e = exp2_of((x - maximum) * scale);
        once[slot] += e;
        if (squared) twice[slot] += e * e;
    };
    int64_t v = 0;
    for (; v + 4 * LANES <= V; v += 4 * LANES)
        for (int slot = 0; slot < 4; ++slot) add(Kind::load(row + v + slot * LANES), slot);
    for (; v < V; v += LANES)
        add(v + LANES <= V ? Kind::load(row + v) : load_part<Kind>(row + v, V - v), 0);
    sums[0] = total(once);
    sums[1] = total(twice);
}

template <class Kind>
void group_maxima(const typename Kind::Stored* row, int64_t V, Floats (&maxima)[VECTORS]) {
    constexpr int HELD = WIDTH == 16 ? 16 : 4;  // maxima in registers
    int64_t whole = V / GROUP * GROUP;
    for (int first = 0; first < VECTORS; first += HELD) {
        Floats held[HELD];
        for (auto& one : held) one = Floats{} - INFINITY;
        for (int64_t v = first * LANES; v < whole; v += GROUP)
            for (int i = 0; i < HELD; ++i) {
                Floats x = Kind::load(row + v + i * LANES);
                held[i] = larger(x, held[i]);
            }
        std::memcpy(maxima + first, held, sizeof held);
    }
    for (int64_t v = whole; v < V; v += LANES) {
        Floats x = v + LANES <= V ? Kind::load(row + v) : load_part<Kind>(row + v, V - v);
        Floats& maximum = maxima[(v - whole) / LANES];
        maximum = larger(x, maximum);
    }
}

// A lower bound of the k-th largest maximum: the largest multiple of 2 ** 16, as a key, that k of them reach.
int32_t threshold(const Floats (&maxima)[VECTORS], int64_t k) {
    alignas(64) int16_t keys[GROUP];
    for (int i = 0; i < GROUP; ++i) keys[i] = int16_t(key(maxima[i / LANES][i % LANES]) >> 16);
    int32_t low = -32768, high = 32767;  // k maxima reach `low`
    while (low < high) {
        int16_t middle = int16_t((low + high + 1) >> 1), count = 0;
        for (int i = 0; i < GROUP; ++i) count += keys[i] >= middle;
        if (count >= k) low = middle;
        else high = middle - 1;
    }
    return low * 65536;
}

// An entry is a key and, below it, the complement of its id, so that the lower id of equals is the larger.
int64_t entry(int32_t key, int64_t v) {
    return int64_t(uint64_t(uint32_t(key)) << 32 | (0xffffffffu - uint32_t(v)));
}

// The k largest entries in order: the place of one is the number of entries before it. A row with NaN can have
// fewer; its other places stay as they were.
void place(std::vector<int64_t>& entries, int64_t k, int64_t* ids, float* values) {
    constexpr size_t FEW = 512;
    if (entries.size() > FEW) {
        const int64_t kept = std::min<int64_t>(k, int64_t(entries.size()));
        std::partial_sort(entries.begin(), entries.begin() + kept, entries.end(), std::greater<int64_t>());
        entries.resize(kept);
    }
    const int64_t* all = entries.data();
    const int64_t count = int64_t(entries.size());
    for (int64_t i = 0; i < count; ++i) {
        int64_t before = 0, one = all[i];
        for (int64_t j = 0; j < count; ++j) before += all[j] > one;
        if (before >= k) continue;
        ids[before] = 0xffffffff - (one & 0xffffffff);
        values[before] = value_of(int32_t(one >> 32));
    }
}

template <class Kind>
void reduce_row(const typename Kind::Stored* row, int64_t V, int64_t k, const float* temperatures, int64_t T,
                int64_t* ids, float* values, float* logsumexp, std::vector<int64_t>& entries) {
    Floats maxima[VECTORS];
    group_maxima<Kind>(row, V, maxima);
    float maximum = -INFINITY;
    for (int i = 0; i < GROUP; ++i) maximum = std::max(maximum, maxima[i / LANES][i % LANES]);
    const int32_t least = threshold(maxima, std::min<int64_t>(k, GROUP));
    entries.clear();
    if (k <= GROUP) {
        for (int64_t g = 0; g < std::min<int64_t>(GROUP, V); ++g) {
            if (key(maxima[g / LANES][g % LANES]) < least) continue;
            for (int64_t v = g; v < V; v += GROUP) {
                int32_t one = key(Kind::widen(row[v]));
                if (one >= least) entries.push_back(entry(one, v));
            }
        }
    } else {
        for (int64_t v = 0; v < V; ++v) entries.push_back(entry(key(Kind::widen(row[v])), v));
    }
    place(entries, k, ids, values);
    for (int64_t j = T - 1; j >= 0; --j) {  // ascending temperatures, the hottest first
        double sums[2];
        const bool pair = j > 0 && temperatures[j] == 2 * temperatures[j - 1];
        if (pair) exponentials<Kind, true>(row, V, maximum, temperatures[j], sums);
        else exponentials<Kind, false>(row, V, maximum, temperatures[j], sums);
        logsumexp[j] = float(double(maximum) / temperatures[j] + std::log(sums[0]));
        if (pair) {
            --j;
            logsumexp[j] = float(double(maximum) / temperatures[j] + std::log(sums[1]));
        }
    }
}

template <class Kind>
void reduce_rows(const void* logits, int64_t N, int64_t V, int64_t k, const float* temperatures, int64_t T,
                 int64_t* ids, float* values, float* logsumexp) {
    auto rows = static_cast<const typename Kind::Stored*>(logits);
    std::vector<int64_t> entries;
    for (int64_t n = 0; n < N; ++n)
        reduce_row<Kind>(rows + n * V, V, k, temperatures, T, ids + n * k, values + n * k, logsumexp + n * T, entries);
}

}  // namespace

// logits [N, V]; temperatures [T] ascending; ids [N, k], values [N, k], logsumexp [N, T] are written.
extern "C" void reduce_float32(const void* logits, int64_t N, int64_t V, int64_t k, const float* temperatures,
                               int64_t T, int64_t* ids, float* values, float* logsumexp) {
    reduce_rows<Float32>(logits, N, V, k, temperatures, T, ids, values, logsumexp);
}

extern "C" void reduce_bfloat16(const void* logits, int64_t N, int64_t V, int64_t k, const float* temperatures,
                                int64_t T, int64_t* ids, float* values, float* logsumexp) {
    reduce_rows<Bfloat16>(logits, N, V, k, temperatures, T, ids, values, logsumexp);
}
