# add_simulator_library(name MODE fast|count|asan SOURCES a.metal ... [STANDARD metal4.0] [INCLUDE_DIRECTORIES dir ...]
#                       [DEFINITIONS X=1 ...])
# compiles each .metal for the simulator, rebuilt when a header changes, and links them to a shared library `name` against
# the target mfa_simulator. A warning is an error. Needs the package ziglang; see csrc/simulator/translate.py.
set(MFA_TRANSLATE "${CMAKE_CURRENT_LIST_DIR}/../csrc/simulator/translate.py")

function(add_simulator_library name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "MODE;STANDARD" "SOURCES;INCLUDE_DIRECTORIES;DEFINITIONS")
  if(NOT arg_STANDARD)
    set(arg_STANDARD metal3.1)
  endif()
  list(TRANSFORM arg_INCLUDE_DIRECTORIES PREPEND -I)
  list(TRANSFORM arg_DEFINITIONS PREPEND -D)
  cmake_path(ABSOLUTE_PATH MFA_TRANSLATE NORMALIZE OUTPUT_VARIABLE translate)
  set(directory "${CMAKE_CURRENT_BINARY_DIR}/${name}.dir")
  file(MAKE_DIRECTORY "${directory}")

  set(objects)
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source)
    cmake_path(GET source STEM stem)
    set(object "${directory}/${stem}.o")
    add_custom_command(
      OUTPUT "${object}"
      COMMAND "${Python_EXECUTABLE}" "${translate}" --mode ${arg_MODE} --standard ${arg_STANDARD} --strict ${arg_INCLUDE_DIRECTORIES} ${arg_DEFINITIONS}
              --depfile "${object}.d" -o "${object}" "${source}"
      DEPENDS "${source}" "${translate}"
      DEPFILE "${object}.d"
      COMMENT "Simulator (${arg_MODE}) ${stem}"
      VERBATIM)
    list(APPEND objects "${object}")
  endforeach()
  set_source_files_properties(${objects} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)

  add_library(${name} SHARED ${objects})
  set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
  target_link_libraries(${name} PRIVATE mfa_simulator m)
  if(CMAKE_OBJCOPY AND arg_MODE STREQUAL "count")  # findings need lines, which are not in the symbol table
    add_custom_command(TARGET ${name} POST_BUILD VERBATIM
      COMMAND "${CMAKE_OBJCOPY}" --strip-all "--keep-section=.debug_*" $<TARGET_FILE:${name}>)
  endif()
  if(arg_MODE STREQUAL "asan")
    target_link_options(${name} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()
