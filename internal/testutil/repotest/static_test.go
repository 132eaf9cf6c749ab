package repotest

import (
	"debug/buildinfo"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// Programs are one static file each: no dynamic loader, no shared library (so none of libibverbs), no cgo. The kernel's
// devices are driven all the same.
func TestStatic(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("what is looked at is an ELF file of Linux")
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("no go command")
	}
	dir := t.TempDir()
	build := exec.Command(goTool, "build", "-pgo=off", "-o", dir+"/", "./cmd/ringside", "./examples/...", "./test/soft-roce", "./test/interop")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath") // as make builds
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) < 8 {
		t.Fatalf("%d programs were built: %v", len(files), err)
	}
	for _, f := range files {
		name := filepath.Base(f)
		e, err := elf.Open(f)
		if err != nil {
			t.Fatal(err)
		}
		if libs, err := e.ImportedLibraries(); err != nil || len(libs) > 0 {
			t.Errorf("%s needs %v, %v", name, libs, err)
		}
		for _, p := range e.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s has a %v segment: it is not linked statically", name, p.Type)
			}
		}
		syms, err := e.Symbols()
		for _, s := range syms {
			if strings.HasPrefix(s.Name, "ibv_") || strings.HasPrefix(s.Name, "rdma_create") || strings.HasPrefix(s.Name, "x_cgo_") || strings.HasPrefix(s.Name, "runtime/cgo.") {
				t.Errorf("%s has the C symbol %s", name, s.Name)
			}
		}
		if err != nil || len(syms) == 0 {
			t.Errorf("%s has no symbols to look at: %v", name, err)
		}
		e.Close()
		info, err := buildinfo.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		cgo := ""
		for _, s := range info.Settings {
			if s.Key == "CGO_ENABLED" {
				cgo = s.Value
			}
		}
		if cgo != "0" {
			t.Errorf("%s was built with CGO_ENABLED=%q", name, cgo)
		}
	}
}
