# add_metal_library(name STANDARD metal3.1 DEPLOYMENT_TARGET 14.0 [LEAST_SDK 26.2] SOURCES a.metal ...)
# compiles each source to .air and links them to ${CMAKE_CURRENT_BINARY_DIR}/${name}.metallib, rebuilt when a header changes.
# With an older SDK than LEAST_SDK there is no such library, and a message.
function(add_metal_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "STANDARD;DEPLOYMENT_TARGET;LEAST_SDK" "SOURCES")

  execute_process(
    COMMAND sh "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/metal_toolchain.sh"
    RESULT_VARIABLE result OUTPUT_VARIABLE toolchain OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_VARIABLE message)
  if(MFA_REQUIRE_METALLIB)
    set(severity FATAL_ERROR)
  else()
    set(severity WARNING)
  endif()
  if(result)
    message(${severity} "No metallib: kernels are compiled on first use.\n${message}")
    return()
  endif()
  set(xcrun xcrun -sdk macosx)
  if(toolchain)
    set(xcrun "${CMAKE_COMMAND}" -E env "TOOLCHAINS=${toolchain}" ${xcrun})
  endif()
  if(arg_LEAST_SDK)
    execute_process(COMMAND ${xcrun} --show-sdk-version OUTPUT_VARIABLE sdk OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(sdk VERSION_LESS arg_LEAST_SDK)
      message(${severity} "No ${name}.metallib: it needs the SDK of macOS ${arg_LEAST_SDK}, and this is that of ${sdk}.")
      return()
    endif()
  endif()

  set(extensions)
  if(arg_STANDARD STREQUAL "metal4.0")
    set(extensions -Wno-c++20-extensions)  # matmul2d takes an object as template argument
  endif()

  set(airs)
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source)
    cmake_path(GET source STEM stem)
    set(air "${CMAKE_CURRENT_BINARY_DIR}/${name}.dir/${stem}.air")
    add_custom_command(
      OUTPUT "${air}"
      COMMAND ${xcrun} metal -std=${arg_STANDARD} -mmacosx-version-min=${arg_DEPLOYMENT_TARGET}
              -fno-fast-math -Wall -Wextra ${extensions} -MMD -MF "${air}.d" -c "${source}" -o "${air}"
      DEPENDS "${source}"
      DEPFILE "${air}.d"
      COMMENT "Metal ${stem}"
      VERBATIM)
    list(APPEND airs "${air}")
  endforeach()
  file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/${name}.dir")

  set(metallib "${CMAKE_CURRENT_BINARY_DIR}/${name}.metallib")
  add_custom_command(
    OUTPUT "${metallib}"
    COMMAND ${xcrun} metallib ${airs} -o "${metallib}"
    DEPENDS ${airs}
    COMMENT "Metal library ${name}"
    VERBATIM)
  add_custom_target(${name}_metallib ALL DEPENDS "${metallib}")
endfunction()
