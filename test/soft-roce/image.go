//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// An image is what machines are started from: a kernel, and an initramfs with its modules and the tools. It lies in the
// cache folder,
//
//	<cache>/debs/                      Debian packages, as downloaded
//	<cache>/<release>/siw-<key>.ko     the module that Debian does not build
//	<cache>/<release>/image-<key>/     an image; the key covers the recipe and the versions of all packages
//	<cache>/<track>-<arch>             a link to the image in use; the track is what -kernel says
//	<cache>/apt-<arch>/                apt's lists of packages of an architecture that is not the host's
//	<cache>/lock
//
// An image is made in a folder of another name and renamed when it is complete, so what has the name is whole.
type image struct {
	dir      string
	manifest manifest
}

// A manifest says what an image was made from. With the recipe it holds everything that the image depends on.
type manifest struct {
	Recipe   string   // of the program that made it
	Release  string   // of the kernel
	Packages []string // file names, which hold the versions
}

func (m *image) kernel() string { return filepath.Join(m.dir, "vmlinux") }
func (m *image) base() string   { return filepath.Join(m.dir, "base.cpio") }

const manifestName = "manifest.json"

// recipeVersion changes with the code that makes images, when what it makes changes. (Lists have their own part in the key.)
const recipeVersion = 1

func (a *arch) recipe() string {
	return key(recipeVersion, wantedModules, a.toolPackages(), a.toolFolders(), a.toolFiles())
}

// key is a short hash of values.
func key(values ...any) string {
	h := sha256.New()
	for _, v := range values {
		fmt.Fprintf(h, "%v\n", v)
	}
	return hex.EncodeToString(h.Sum(nil))[:12]
}

// A cache is the folder of images.
type cache struct {
	dir string
	log func(format string, args ...any) // takes what the user may want to know of steps that take long
}

func openCache(log func(string, ...any)) (*cache, error) {
	dir, err := cacheFolder()
	if err != nil {
		return nil, err
	}
	return &cache{dir, log}, os.MkdirAll(dir, 0o755)
}

// cacheFolder goes by the environment.
func cacheFolder() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no folder for the image: %w: set XDG_CACHE_HOME or HOME", err)
	}
	return filepath.Join(base, "ringside", "soft-roce"), nil
}

// image returns the image of a track and architecture, built if there is none or if it was made by another recipe. With refresh it also asks
// apt whether there are newer packages.
func (c *cache) image(ctx context.Context, track string, a *arch, refresh bool) (*image, error) {
	if img, err := c.current(track, a); err == nil && !refresh {
		return img, nil
	}
	unlock, err := c.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if img, err := c.current(track, a); err == nil && !refresh { // another run has built it meanwhile
		return img, nil
	}
	return c.build(ctx, track, a)
}

// current opens the image that the track's link leads to, if this program would build the same.
func (c *cache) current(track string, a *arch) (*image, error) {
	dir, err := filepath.EvalSymlinks(c.linkTo(track, a))
	if err != nil {
		return nil, err
	}
	img := &image{dir: dir}
	text, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &img.manifest); err != nil {
		return nil, err
	}
	if img.manifest.Recipe != a.recipe() {
		return nil, errors.New("made by another recipe")
	}
	return img, nil
}

// lock keeps builds apart. It goes with the process.
func (c *cache) lock() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		c.log("waiting for another run that builds an image (%s)", f.Name())
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	} else if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// build makes the track's image from the packages that apt has now, or finds it made, and has the track lead to it.
func (c *cache) build(ctx context.Context, track string, a *arch) (*image, error) {
	if err := needPrograms(ctx, c.log, buildPrograms(track, a)); err != nil {
		return nil, err
	}
	apt := &apt{arch: a, archives: filepath.Join(c.dir, "debs"), state: filepath.Join(c.dir, "apt-"+a.name)}
	if a.foreign() { // nobody else keeps these lists up to date
		if err := apt.update(ctx, c.log); err != nil {
			return nil, err
		}
	}
	p, err := apt.plan(ctx, track)
	if errors.Is(err, errUpdate) && os.Geteuid() == 0 && !a.foreign() {
		if err := apt.update(ctx, c.log); err != nil {
			return nil, err
		}
		p, err = apt.plan(ctx, track)
	}
	if err != nil {
		return nil, err
	}
	img := &image{manifest: manifest{Recipe: a.recipe(), Release: p.release}}
	for _, d := range slices.Concat([]deb{p.kernel}, p.tools, p.sources) {
		img.manifest.Packages = append(img.manifest.Packages, d.file)
	}
	folder := filepath.Join(c.dir, p.release)
	img.dir = filepath.Join(folder, "image-"+key(img.manifest))
	if _, err := os.Stat(filepath.Join(img.dir, manifestName)); err != nil {
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return nil, err
		}
		if err := c.make(ctx, apt, img, p); err != nil {
			return nil, fmt.Errorf("build the image of Linux %s: %w", p.release, err)
		}
	}
	return img, c.link(c.linkTo(track, a), img)
}

// linkTo is the link to a track's image.
func (c *cache) linkTo(track string, a *arch) string { return filepath.Join(c.dir, track+"-"+a.name) }

// link has the link lead to the image, in one step.
func (c *cache) link(name string, img *image) error {
	to, err := filepath.Rel(c.dir, img.dir)
	if err != nil {
		return err
	}
	next := name + ".new"
	_ = os.Remove(next) // a run that was killed here has left it
	if err := os.Symlink(to, next); err != nil {
		return err
	}
	return os.Rename(next, name)
}

// make makes the image.
func (c *cache) make(ctx context.Context, apt *apt, img *image, p *plan) (err error) {
	folder := filepath.Dir(img.dir)
	tmp, err := os.MkdirTemp(folder, "tmp-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	siw := filepath.Join(folder, "siw-"+key(recipeVersion, p.sources)+".ko")
	_, err = os.Stat(siw)
	buildSiw := err != nil
	fetch := append([]deb{p.kernel}, p.tools...)
	if buildSiw {
		fetch = append(fetch, p.sources...)
	}
	if err := apt.download(ctx, c.log, fetch); err != nil {
		return err
	}
	toolsDir := filepath.Join(tmp, "tools")
	for _, d := range p.tools {
		if err := apt.extract(ctx, d, toolsDir); err != nil {
			return err
		}
	}
	if buildSiw {
		c.log("building the module siw for Linux %s: Debian has it in no package", p.release)
		b := siwBuild{apt: apt, arch: apt.arch, debs: p.sources, release: p.release, dir: filepath.Join(tmp, "siw"), libraries: toolsDir}
		if err := b.run(ctx, siw); err != nil {
			return fmt.Errorf("build the module siw: %w", err)
		}
	}
	c.log("making the image of Linux %s", img.manifest.Release)
	kernelDir := filepath.Join(tmp, "kernel")
	if err := apt.extract(ctx, p.kernel, kernelDir); err != nil {
		return err
	}
	made := filepath.Join(tmp, "image")
	if err := os.Mkdir(made, 0o755); err != nil {
		return err
	}
	if err := extractKernel(ctx, filepath.Join(kernelDir, "boot", "vmlinuz-"+img.manifest.Release), filepath.Join(made, "vmlinux")); err != nil {
		return err
	}
	t := tree{}
	if err := addModules(ctx, t, kernelDir, siw); err != nil {
		return err
	}
	if err := addTools(t, toolsDir, apt.arch); err != nil {
		return err
	}
	if err := writeTree(t, filepath.Join(made, "base.cpio")); err != nil {
		return err
	}
	text, err := json.MarshalIndent(img.manifest, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(made, manifestName), text, 0o644); err != nil {
		return err
	}
	if err := os.RemoveAll(img.dir); err != nil { // whatever it is, it has no manifest
		return err
	}
	return os.Rename(made, img.dir)
}

func writeTree(t tree, name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := t.writeTo(f); err != nil {
		return err
	}
	return f.Close()
}

// workFolder is the folder of a run that the machine shares for reading and writing.
func workFolder(dir string) string { return filepath.Join(dir, "work") }

// track names a kernel that the user may choose.
func checkTrack(track string) error {
	for _, t := range tracks {
		if t == track {
			return nil
		}
	}
	return fmt.Errorf("-kernel %s: there are %s", track, strings.Join(tracks, " and "))
}

var tracks = []string{"6.1", "6.12"}
