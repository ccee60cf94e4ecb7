// What metal-cpp needs of Apple's IOSurface, for checking the macOS sources on Linux. Never used on a Mac.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
