//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// apt is access to Debian's packages. They are downloaded into a folder of our own and extracted, not installed: that needs
// no root, and does not change the host.
type apt struct {
	arch     *arch
	archives string
	state    string // of an architecture that is not the host's: its lists, which the host's apt does not have
}

// A deb is a package as a file of the archives.
type deb struct{ file string }

func (d deb) name() string {
	name, _, _ := strings.Cut(d.file, "_")
	return name
}

// argument is what apt-get download is told, to get this file and no newer one.
func (d deb) argument() string {
	parts := strings.Split(strings.TrimSuffix(d.file, ".deb"), "_") // name, version, architecture
	if parts[2] != "all" {
		parts[0] += ":" + parts[2]
	}
	return parts[0] + "=" + strings.ReplaceAll(parts[1], "%3a", ":")
}

// command runs one of apt's commands with our own archives folder: a parallel apt-get may clean the shared one.
func (a *apt) command(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	if err := os.MkdirAll(filepath.Join(a.archives, "partial"), 0o755); err != nil {
		return nil, err
	}
	options := []string{"-o", "Dir::Cache::archives=" + a.archives, "-o", "APT::Sandbox::User=root", "-q"}
	if a.arch.foreign() {
		if err := os.MkdirAll(filepath.Join(a.state, "lists", "partial"), 0o755); err != nil {
			return nil, err
		}
		options = append(options, "-o", "APT::Architecture="+a.arch.name, "-o", "APT::Architectures="+a.arch.name+","+runtime.GOARCH,
			"-o", "Dir::State="+a.state, "-o", "Dir::State::status=/dev/null", "-o", "Dir::Cache="+a.state)
	}
	cmd := exec.CommandContext(ctx, name, append(options, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	return output(cmd)
}

// update brings fresh lists of packages. Those of the host's architecture are the host's, and take root.
func (a *apt) update(ctx context.Context, log func(string, ...any)) error {
	log("updating apt's lists of packages")
	_, err := a.command(ctx, "", "apt-get", "update")
	return err
}

// A plan is which packages an image is made from, in the versions that apt has now.
type plan struct {
	release string // of the kernel
	kernel  deb
	tools   []deb
	sources []deb // what the module siw is built from
}

func (a *apt) plan(ctx context.Context, track string) (*plan, error) {
	meta := "linux-image-" + a.arch.name
	if track != "6.1" { // what Debian 12 came with
		meta = "linux-image-" + track + "-" + a.arch.name
	}
	text, err := a.command(ctx, "", "apt-cache", "depends", meta)
	if err != nil {
		return nil, withUpdate(err)
	}
	release := kernelDependency(string(text))
	if !strings.HasPrefix(release, track+".") {
		return nil, fmt.Errorf("apt offers no kernel %s: %s depends on %q; this needs Debian 12 with its security archive", track, meta, release)
	}
	headers := "linux-headers-" + release
	if text, err = a.command(ctx, "", "apt-cache", "depends", headers); err != nil {
		return nil, withUpdate(err)
	}
	sources := append([]string{headers, "linux-source-" + track}, headerDependencies(string(text))...)
	names := append([]string{"linux-image-" + release}, a.arch.toolPackages()...)
	names = append(names, sources...)
	if text, err = a.command(ctx, "", "apt-get", append([]string{"download", "--print-uris"}, names...)...); err != nil {
		return nil, withUpdate(err)
	}
	files := map[string]deb{}
	for _, d := range parseURIs(string(text)) {
		files[d.name()] = d
	}
	p := &plan{release: release}
	for _, n := range names {
		name, _, _ := strings.Cut(n, ":")
		d, ok := files[name]
		switch {
		case !ok:
			return nil, withUpdate(fmt.Errorf("apt names no file for the package %s", n))
		case n == names[0]:
			p.kernel = d
		case slices.Contains(sources, n):
			p.sources = append(p.sources, d)
		default:
			p.tools = append(p.tools, d)
		}
	}
	return p, nil
}

var kernelDepends = regexp.MustCompile(`(?m)^\s*Depends: linux-image-(\S+)$`)

func kernelDependency(text string) string {
	if m := kernelDepends.FindStringSubmatch(text); m != nil {
		return m[1]
	}
	return ""
}

var headerDepends = regexp.MustCompile(`(?m)^\s*Depends: (linux-(?:headers|kbuild)-\S+)$`)

// headerDependencies are the packages that headers need to build modules: with programs for this host.
func headerDependencies(text string) (names []string) {
	for _, m := range headerDepends.FindAllStringSubmatch(text, -1) {
		name := m[1]
		if strings.HasPrefix(name, "linux-kbuild-") {
			name += ":" + runtime.GOARCH
		}
		names = append(names, name)
	}
	return names
}

var uriLine = regexp.MustCompile(`(?m)^'[^']*' ([^\s_]+_[^\s_]+_[^\s_]+\.deb) \d+`)

// parseURIs reads the lines of apt-get --print-uris: 'URI' file size hash.
func parseURIs(text string) (debs []deb) {
	for _, m := range uriLine.FindAllStringSubmatch(text, -1) {
		debs = append(debs, deb{m[1]})
	}
	return debs
}

// download fetches those that are not there yet. apt checks what it fetches.
func (a *apt) download(ctx context.Context, log func(string, ...any), debs []deb) error {
	var names []string
	for _, d := range debs {
		if _, err := os.Stat(filepath.Join(a.archives, d.file)); err != nil {
			names = append(names, d.argument())
		}
	}
	if len(names) == 0 {
		return nil
	}
	log("downloading %d packages into %s", len(names), a.archives)
	tmp, err := os.MkdirTemp(a.archives, "get-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if _, err := a.command(ctx, tmp, "apt-get", append([]string{"download"}, names...)...); err != nil {
		return withUpdate(err)
	}
	for _, d := range debs {
		err := os.Rename(filepath.Join(tmp, d.file), filepath.Join(a.archives, d.file))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if _, err := os.Stat(filepath.Join(a.archives, d.file)); err != nil {
			return fmt.Errorf("apt-get download did not bring %s: %w", d.file, err)
		}
	}
	return nil
}

// extract unpacks a package into a folder.
func (a *apt) extract(ctx context.Context, d deb, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	_, err := output(exec.CommandContext(ctx, "dpkg", "-x", filepath.Join(a.archives, d.file), dir))
	return err
}

// output runs a command and returns what it prints. The error has what it complains of.
func output(cmd *exec.Cmd) ([]byte, error) {
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(lastLines(complaint.String(), 20)))
	}
	return out.Bytes(), nil
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(len(lines)-n, 0):], "\n")
}

// pipe runs a command that turns its input into its output.
func pipe(ctx context.Context, in []byte, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin = bytes.NewReader(in)
	return output(cmd)
}
