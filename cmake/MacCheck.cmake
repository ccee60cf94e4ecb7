# Toolchain file of `make mac-check`: compiles for macOS on arm64 with zig's clang, on Linux, and links strictly against stubs
# and torch's real macOS library. tests/mac_check makes the tools and passes MFA_MAC_TOOLS. Never ship what it builds.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_SYSROOT "")
set(CMAKE_OSX_DEPLOYMENT_TARGET "")
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES MFA_MAC_TOOLS)
set(CMAKE_CXX_COMPILER "${MFA_MAC_TOOLS}/mac-c++")
set(CMAKE_CXX_COMPILER_WORKS 1)
# Linux's binutils can't read Mach-O, and no install name is ever rewritten.
set(CMAKE_AR "${MFA_MAC_TOOLS}/mac-ar")
set(CMAKE_RANLIB "${MFA_MAC_TOOLS}/mac-ranlib")
set(CMAKE_INSTALL_NAME_TOOL true)
# Two headers that metal-cpp needs and zig lacks.
include_directories(SYSTEM "${CMAKE_CURRENT_LIST_DIR}/mac_headers")
# FindPython wants one, to run the build machine's own Python.
set(CMAKE_CROSSCOMPILING_EMULATOR env)
# zig has no clang-scan-deps, and the sources no modules.
set(CMAKE_CXX_SCAN_FOR_MODULES OFF)
