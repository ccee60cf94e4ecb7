// The types that metal-cpp takes from CoreFoundation.
#pragma once

#include <math.h>  // metal-cpp uses INFINITY
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef double CFTimeInterval;
typedef double CGFloat;
typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;

typedef struct CGSize {
  CGFloat width, height;
} CGSize;

#ifdef __cplusplus
extern "C"
#endif
    CFStringRef __CFStringMakeConstantString(const char* text);
