// What metal-cpp needs of the Objective-C runtime, on Linux. Implemented by ../runtime.cpp and ../send.S.
#pragma once

#include <stdbool.h>

typedef struct objc_class* Class;
struct objc_object {
  Class isa;
};
typedef struct objc_object* id;
typedef struct objc_selector* SEL;
typedef bool BOOL;
typedef struct objc_object Protocol;

#define OBJC_EXPORT __attribute__((visibility("default")))
