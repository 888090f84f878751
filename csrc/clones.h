/* One function for several generations of processors. Plain C, for the library of torch operators and for the JPEG one. */
#pragma once

/* A function with this mark is compiled for AVX-512, for AVX2 and for any x86-64; the loader picks. One library then runs
 * on every node of a mixed cluster. Functions it calls have to be inlined, or they stay code for any x86-64. The levels are
 * named, not processors: GCC would pick "arch=haswell" on a Haswell alone. */
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12 && !defined(IOMM_ONE_CLONE)
#define IOMM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define IOMM_CLONES
#endif
#define IOMM_INLINE inline __attribute__((always_inline))
