//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// A hostProgram is one that this program starts on the host, and the Debian package that has it.
type hostProgram struct{ name, pkg string }

// buildPrograms are needed to make an image.
func buildPrograms(track string, a *arch) []hostProgram {
	gcc, strip := a.compiler()
	p := []hostProgram{
		{"apt-get", "apt"}, {"apt-cache", "apt"}, {"dpkg", "dpkg"}, {"xz", "xz-utils"}, {"tar", "tar"},
		{"make", "make"}, gcc, strip,
	}
	if track != "6.1" {
		p = append(p, hostProgram{"zstd", "zstd"}) // what later kernels are compressed with
	}
	return p
}

// errUpdate marks failures that fresher lists of packages may mend.
var errUpdate = errors.New("the lists of packages may be missing or old: `apt-get update` as root brings new ones")

func withUpdate(err error) error { return fmt.Errorf("%w\n%w", err, errUpdate) }

// needPrograms makes sure that programs are there. Root has missing ones installed; others are told what to do.
func needPrograms(ctx context.Context, log func(string, ...any), programs []hostProgram) error {
	missing, packages := missingPrograms(programs)
	if len(missing) == 0 {
		return nil
	}
	if os.Geteuid() == 0 {
		if _, err := exec.LookPath("apt-get"); err == nil {
			log("installing %s, for %s", strings.Join(packages, " "), strings.Join(missing, " "))
			if err := install(ctx, packages); err != nil {
				return err
			}
			missing, packages = missingPrograms(programs)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s: not there: install with `sudo apt-get install --no-install-recommends %s`",
			strings.Join(missing, " "), strings.Join(packages, " "))
	}
	return nil
}

func missingPrograms(programs []hostProgram) (names, packages []string) {
	for _, p := range programs {
		if _, err := exec.LookPath(p.name); err != nil {
			names = append(names, p.name)
			if !slices.Contains(packages, p.pkg) {
				packages = append(packages, p.pkg)
			}
		}
	}
	return names, packages
}

// install installs packages, after an update of the lists if it does not work without.
func install(ctx context.Context, packages []string) error {
	args := append([]string{"install", "-y", "-q", "--no-install-recommends"}, packages...)
	err := aptGet(ctx, args...)
	if err != nil {
		if err = aptGet(ctx, "update", "-q"); err == nil {
			err = aptGet(ctx, args...)
		}
	}
	if err != nil {
		return fmt.Errorf("install what is missing: %w", err)
	}
	return nil
}

func aptGet(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
	_, err := output(cmd)
	return err
}
