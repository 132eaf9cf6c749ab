//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// rdmaPackages are the packages whose programs commands find in the machine, and the libraries that a Debian without RDMA
// lacks.
var rdmaPackages = strings.Fields(`
	ibverbs-utils rdmacm-utils perftest rdma-core
	ibverbs-providers libibverbs1 librdmacm1 libibumad3 libnl-3-200 libnl-route-3-200 libpci3
	iproute2 libmnl0 libbpf1 libelf1 libcap2 libtirpc3 libxtables12 libbsd0 libmd0 libdb5.3 zlib1g
	tcpdump libpcap0.8 libdbus-1-3 strace busybox-static`)

// basePackages are those of any Debian, for machines that cannot run the host's: the C library and its kin, and what scripts need.
var basePackages = strings.Fields(`
	libc6 libgcc-s1 libselinux1 libpcre2-8-0 libacl1 libattr1 libgmp10 libtinfo6 libproc2-0 libsystemd0 libzstd1 liblzma5 liblz4-1
	libgcrypt20 libgpg-error0 libssl3 libmount1 libblkid1 libuuid1 libsmartcols1 libgssapi-krb5-2 libkrb5-3 libk5crypto3
	libkrb5support0 libkeyutils1 libcom-err2 libudev1
	dash bash coreutils diffutils findutils grep sed mawk procps util-linux`)

func (a *arch) toolPackages() []string {
	if a.foreign() {
		return slices.Concat(rdmaPackages, basePackages)
	}
	return rdmaPackages
}

// toolFolders are what the machine takes of these packages, in the layout of a merged /usr.
func (a *arch) toolFolders() []string {
	return []string{"usr/bin/", "usr/sbin/", "usr/lib/" + a.triplet + "/", "etc/iproute2/"}
}

// toolFiles are further files. Only the drivers of the devices that there are, or that "ringside emulate" has, are configured: libibverbs
// would try all others.
func (a *arch) toolFiles() []string {
	files := []string{"etc/libibverbs.d/rxe.driver", "etc/libibverbs.d/siw.driver", "etc/libibverbs.d/mlx5.driver"}
	if a.foreign() {
		files = append(files, a.linker)
	}
	return files
}

// addTools adds the tools from the folder where the packages were extracted.
func addTools(t tree, dir string, a *arch) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		name = merged(name)
		wanted := slices.Contains(a.toolFiles(), name) ||
			slices.ContainsFunc(a.toolFolders(), func(f string) bool { return strings.HasPrefix(name, f) })
		if !wanted || strings.HasSuffix(name, ".a") || strings.HasPrefix(name, "usr/lib/"+a.triplet+"/pkgconfig/") {
			return nil
		}
		name = strings.TrimPrefix(guestTools, "/") + "/" + name
		switch {
		case d.Type() == fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			t.symlink(name, to)
		case d.Type().IsRegular():
			info, err := d.Info()
			if err != nil {
				return err
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			t.file(name, uint32(info.Mode().Perm()), data)
		}
		return nil
	})
}

// merged is where a package's file is on a system whose /bin, /sbin, /lib and /lib64 lead to /usr, as Debian's do.
func merged(name string) string {
	for _, top := range []string{"bin/", "sbin/", "lib/", "lib64/"} {
		if strings.HasPrefix(name, top) {
			return "usr/" + name
		}
	}
	return name
}

// addModules adds the modules that the machine loads, uncompressed, and their modules.dep.
func addModules(ctx context.Context, t tree, kernelDir, siw string) error {
	files, builtin, err := listModules(kernelDir)
	if err != nil {
		return err
	}
	files["siw"] = siw
	graph := moduleGraph{}
	var add func(name string) error
	add = func(name string) error {
		name = canonical(name)
		if _, ok := graph[name]; ok || builtin[name] {
			return nil
		}
		path, ok := files[name]
		if !ok {
			return fmt.Errorf("the kernel's package has no module %s", name)
		}
		ko, err := readModule(ctx, path)
		if err != nil {
			return err
		}
		info, err := readModuleInfo(ko)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		graph[name] = info.depends
		t.file(moduleFile(name+".ko"), 0o644, ko)
		for _, d := range info.depends {
			if err := add(d); err != nil {
				return fmt.Errorf("%w, which %s needs", err, name)
			}
		}
		return nil
	}
	for _, group := range wantedModules {
		for _, name := range group {
			if err := add(name); err != nil {
				return err
			}
		}
	}
	t.file(moduleFile("modules.dep"), 0o644, graph.encode())
	return nil
}

func moduleFile(name string) string { return strings.TrimPrefix(guestModules, "/") + "/" + name }

// listModules finds the modules of an extracted kernel package by name, and the names of those that the kernel contains.
func listModules(kernelDir string) (files map[string]string, builtin map[string]bool, err error) {
	files, builtin = map[string]string{}, map[string]bool{}
	name := func(path string) string {
		base, _, _ := strings.Cut(filepath.Base(path), ".ko")
		return canonical(base)
	}
	err = filepath.WalkDir(kernelDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch base := d.Name(); {
		case strings.HasSuffix(base, ".ko"), strings.HasSuffix(base, ".ko.xz"):
			files[name(base)] = path
		case base == "modules.builtin":
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(text)) {
				builtin[name(line)] = true
			}
		}
		return nil
	})
	return files, builtin, err
}

func readModule(ctx context.Context, path string) ([]byte, error) {
	ko, err := os.ReadFile(path)
	if err != nil || !strings.HasSuffix(path, ".xz") {
		return ko, err
	}
	return pipe(ctx, ko, "xz", "-dc")
}

// extractKernel writes a kernel that is not compressed, which spares the machine seconds. Of a bzImage that is the ELF file in it, which
// starts at its PVH entry; those of arm64 are as they should be.
func extractKernel(ctx context.Context, from, to string) error {
	bz, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if isArm64Image(bz) {
		return os.WriteFile(to, bz, 0o644)
	}
	payload, err := bzPayload(bz)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	compressed, size, err := splitPayload(payload)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	command, err := decompressor(compressed)
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	kernel, err := pipe(ctx, compressed, command[0], command[1:]...)
	if err != nil {
		return err
	}
	if uint64(len(kernel)) != uint64(size) || !bytes.HasPrefix(kernel, []byte("\x7fELF")) {
		return fmt.Errorf("%s: what it holds is no ELF file of %d bytes", from, size)
	}
	return os.WriteFile(to, kernel, 0o644)
}
