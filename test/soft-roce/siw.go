//go:build linux

package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// A siwBuild builds the module siw, which Debian's kernels are configured without, from Debian's own source of the same
// kernel. Headers and source are extracted, not installed, into dir.
type siwBuild struct {
	apt       *apt
	arch      *arch
	debs      []deb // headers, kbuild, source
	release   string
	dir       string
	libraries string // a root whose libraries the kernel's build programs may need (libelf)
}

func (b *siwBuild) run(ctx context.Context, to string) error {
	for _, d := range b.debs {
		if err := b.apt.extract(ctx, d, b.dir); err != nil {
			return err
		}
	}
	if err := b.relocate(); err != nil {
		return err
	}
	source, err := b.source(ctx)
	if err != nil {
		return err
	}
	make := exec.CommandContext(ctx, "make", fmt.Sprintf("-j%d", runtime.NumCPU()),
		"-C", filepath.Join(b.dir, "usr/src/linux-headers-"+b.release), "M="+source, "CONFIG_RDMA_SIW=m", "CROSS_COMPILE="+b.arch.triplet+"-",
		"CONFIG_DEBUG_INFO_BTF_MODULES=", // nobody needs its type information, which takes a further program (pahole)
		"modules")
	make.Env = append(os.Environ(), "LC_ALL=C",
		"LD_LIBRARY_PATH="+filepath.Join(b.libraries, "usr/lib", b.arch.triplet)+":"+filepath.Join(b.libraries, "lib", b.arch.triplet))
	if _, err := output(make); err != nil {
		return err
	}
	ko := filepath.Join(source, "siw.ko")
	_, strip := b.arch.compiler()
	if _, err := output(exec.CommandContext(ctx, strip.name, "--strip-debug", ko)); err != nil {
		return err
	}
	return os.Rename(ko, to)
}

// relocate has the headers' makefiles name the folder where they are, instead of the one where they would be installed.
func (b *siwBuild) relocate() error {
	headers := filepath.Join(b.dir, "usr/src")
	return filepath.WalkDir(headers, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		depth := strings.Count(strings.TrimPrefix(path, headers), "/")
		if d.IsDir() && depth > 1 {
			return fs.SkipDir
		}
		if !d.Type().IsRegular() || depth != 2 || d.Name() != "Makefile" && d.Name() != ".kernelvariables" {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, []byte(strings.ReplaceAll(string(text), "/usr/src/linux-headers-", headers+"/linux-headers-")), 0o644)
	})
}

// source unpacks the driver's folder from the kernel's source, which is an archive in its package.
func (b *siwBuild) source(ctx context.Context) (string, error) {
	archives, err := filepath.Glob(filepath.Join(b.dir, "usr/src/linux-source-*.tar.xz"))
	if err != nil || len(archives) != 1 {
		return "", fmt.Errorf("the kernel's source package has %d archives in usr/src: one was expected", len(archives))
	}
	top := strings.TrimSuffix(filepath.Base(archives[0]), ".tar.xz")
	folder := top + "/drivers/infiniband/sw/siw"
	if _, err := output(exec.CommandContext(ctx, "tar", "-xJf", archives[0], "-C", b.dir, folder)); err != nil {
		return "", err
	}
	return filepath.Join(b.dir, folder), nil
}
