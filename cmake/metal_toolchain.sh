#!/bin/sh
# Finds Apple's Metal compiler: metal_toolchain.sh [--install]
# Prints the value of TOOLCHAINS with which `xcrun -sdk macosx metal` runs, empty where it needs none. Fails where there is no
# compiler; with --install it downloads Xcode's component first.

# `xcrun --find metal` succeeds without the component: only running the compiler tells.
runs() {
    xcrun -sdk macosx metal --version >/dev/null 2>&1
}

# Prints what makes it run. xcrun does not look into a downloaded component on every machine, unless it is named.
found() {
    runs && return
    TOOLCHAINS=$(xcodebuild -showComponent MetalToolchain 2>/dev/null | sed -n 's/^Toolchain Identifier: *//p')
    export TOOLCHAINS
    [ -n "$TOOLCHAINS" ] && runs && echo "$TOOLCHAINS"
}

(found) && exit
[ "$1" = --install ] && xcodebuild -downloadComponent MetalToolchain >&2 && (found) && exit
xcrun -sdk macosx metal --version >/dev/null # for its message
echo "The Metal toolchain is missing: install Xcode, then run xcodebuild -downloadComponent MetalToolchain" >&2
exit 1
