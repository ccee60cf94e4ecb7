// What metal-cpp needs of Apple's CoreFoundation, for checking the macOS sources on Linux. Never used on a Mac.
#pragma once

#include <TargetConditionals.h>
#include <dispatch/dispatch.h>
#include <mach/mach.h>
#include <math.h>
#include <objc/objc.h>
#include <stdbool.h>
#include <stdint.h>

typedef const void* CFTypeRef;
typedef const struct __CFString* CFStringRef;
typedef double CFTimeInterval;
typedef double CGFloat;

typedef struct CGPoint {
  CGFloat x, y;
} CGPoint;

typedef struct CGSize {
  CGFloat width, height;
} CGSize;

typedef struct CGRect {
  CGPoint origin;
  CGSize size;
} CGRect;
