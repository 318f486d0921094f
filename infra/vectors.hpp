// What the C++ kernels share. Vectors are 16 floats wide on every machine, whatever its registers.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Float32 {
    typedef float Stored;
    static float widen(float x) { return x; }
    static Floats load(const float* p) {
        Floats v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
};

struct Bfloat16 {
    typedef uint16_t Stored;
    static float widen(uint16_t x) {
        uint32_t bits = uint32_t(x) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static Floats load(const uint16_t* p) {
        Halves v;
        std::memcpy(&v, p, sizeof v);
        return (Floats)(__builtin_convertvector(v, Words) << 16);
    }
    static void store(uint16_t* p, Floats v) {  // to the nearest, ties to even; NaN stays NaN
        Words bits = (Words)v;
        Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        Halves halves = __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, Halves);
        std::memcpy(p, &halves, sizeof halves);
    }
};

// 2 ** y by its Taylor polynomial on [-1/2, 1/2]: relative error below 2e-8 before rounding; NaN stays NaN.
inline Floats exp2_of(Floats y) {
    const Floats shift = Floats{} + (12582912.0f + 127.0f);  // rounds y; the low bits hold its exponent field
    y = y < -126.0f ? Floats{} - 126.0f : y;
    Floats rounded = y + shift;
    Floats r = y - (rounded - shift);
    Floats p = Floats{} + 1.5403530393381609e-4f;
    p = p * r + 1.3333558146428443e-3f;
    p = p * r + 9.6181291076284771e-3f;
    p = p * r + 5.5504108664821579e-2f;
    p = p * r + 2.4022650695910071e-1f;
    p = p * r + 6.9314718055994530e-1f;
    p = p * r + 1.0f;
    return p * (Floats)((Ints)rounded << 23);
}

}  // namespace
