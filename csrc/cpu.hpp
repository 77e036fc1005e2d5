// Code for AVX2 and AVX-512 is compiled function by function and chosen when it runs, so that one binary serves every CPU.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_CODE 1
#define AVX2 __attribute__((target("avx2,popcnt")))
#define AVX512 __attribute__((target("avx2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq")))
inline bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }
inline bool cpu_has_avx512() {
    return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq");
}
#else
#define HAS_X86_CODE 0
inline bool cpu_has_avx2() { return false; }
inline bool cpu_has_avx512() { return false; }
#endif

// How a function is to be computed; automatic is what is fastest on this CPU.
enum class Path { automatic, portable, avx2, avx512 };
inline Path fastest_path() { return cpu_has_avx512() ? Path::avx512 : cpu_has_avx2() ? Path::avx2 : Path::portable; }

// Becomes part of every function that calls it, compiled for that one's CPU.
#define INLINE inline __attribute__((always_inline))

// Lanes of the compilers' own vectors. If wider than what the CPU has, GCC takes them one by one.
template <class T, int bytes> struct LanesOf { typedef T type __attribute__((vector_size(bytes))); };

// Where there is no instruction for it, the compiler's own popcount is a slow call.
inline std::int64_t popcount(std::uint64_t bits) {
    bits -= bits >> 1 & 0x5555555555555555u;
    bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
    return ((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56;
}
